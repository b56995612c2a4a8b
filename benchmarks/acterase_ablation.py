"""What ActErase's paper does not tell, measured on the embedded model: tau, importance, sites, top, timesteps, guidance.

    python -m benchmarks.acterase_ablation [--concepts cat airplane noto] [--only TABLE ...] [--images 24]

Objects and a style of the development half (see benchmarks/efficacy/plan.py) are erased one at a time, by settings that differ from
`BASE` in one thing each, and drawn by the prompts of `benchmarks.efficacy`. The calibration of a concept is shared by all settings
that only read it otherwise. The report half is not touched.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.command import arguments, finish, print_table, start
from benchmarks.drawing import draw_shots
from benchmarks.efficacy.numbers import Seen, harmonic, is_seen
from benchmarks.efficacy.plan import (
    ONE_OBJECT,
    SINGLES,
    STYLE_HALVES,
    Counts,
    Job,
    check_unseen,
    find_neighbours,
    object_job,
    style_job,
)
from diffusers_erasure import Erasure, demo, erasures_disabled
from diffusers_erasure.base_model import describe_base
from diffusers_erasure.demo.drawing import GUIDANCE_SCALE, fast_pipeline
from diffusers_erasure.demo.words import HYPERNYMS, STYLES
from diffusers_erasure.layers.activation import MASK
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.methods import acterase
from diffusers_erasure.methods.acterase_pairs import pairs_for
from diffusers_erasure.methods.acterase_sites import find_sites
from diffusers_erasure.methods.probes import inputs_seen
from diffusers_erasure.schema import Concept
from diffusers_erasure.settings import resolve


# As the embedded model is drawn, and every step stored, so that pooling over timesteps can be read from it too.
CALIBRATION: dict[str, Any] = {
    "num_inference_steps": 16,
    "timesteps": 16,
    "guidance_scale": GUIDANCE_SCALE,
    "batch_size": 12,
}
BASE: dict[str, Any] = {"tau": 0.0, "top": 0.1, "blend": 2.0}  # what a table leaves alone
READ = ("importance", "tau", "top", "blend", "by_timestep", "sites", "blocks")  # settings that only read a calibration

# Table -> settings, each `BASE` but for these.
TABLES: dict[str, list[dict[str, Any]]] = {
    "plain": [{"tau": value, "top": None, "blend": 1.0} for value in (0.0, 0.25, 0.5)],
    "top": [{"top": value} for value in (0.03, 0.05, 0.1, 0.2, None)],
    "blend": [{"blend": value} for value in (1.0, 1.5, 2.0, 2.5, 3.0)],
    "tau": [{"tau": value} for value in (0.0, 0.25, 0.5)],
    "importance": [{"importance": value} for value in ("activation", "wanda")],
    "sites": [{"sites": value} for value in ("ff", "attn1")]
    + [{"sites": value, "blend": 1.0} for value in ("attn2", "ff+attn2", "all")],
    "blocks": [{"blocks": value} for value in ("all", "down", "mid", "up")],
    "timesteps": [{"by_timestep": value} for value in (True, False)],
    "rows": [{"rows": value} for value in ("conditional", "all")],
    "anchor": [{"anchor": value} for value in (True, False)],
    "pairs": [{"num_pairs": value} for value in (6, 12, 24)],
}


@dataclasses.dataclass(frozen=True)
class Score:
    """What the judge saw after one erasure, and which share of the units it patches."""

    erased: float
    kept: float
    patched: float
    bytes: int


class Bench:
    """Calibrations and drawings of some concepts, each made once."""

    def __init__(self, concepts: Sequence[str], images: int, further: dict[str, Any]) -> None:
        self.pipe, self.judge, self.further = fast_pipeline(), demo.load_judge(), further
        self.base = describe_base(self.pipe)
        neighbours = find_neighbours(self.pipe)
        counts = Counts(images, images)
        self.jobs: dict[str, Job] = {
            name: style_job(name, counts) if name in STYLES else object_job(ONE_OBJECT, (name,), neighbours, counts)
            for name in concepts
        }
        check_unseen(list(self.jobs.values()))
        self.calibrations: dict[Any, tuple[acterase.Calibration, float]] = {}
        self.scores: dict[Any, Score] = {}

    def concept(self, name: str, anchored: bool) -> Concept:
        return Concept(name, HYPERNYMS.get(name, "") if anchored else "")

    def calibration(self, concept: Concept, settings: acterase.Settings) -> tuple[acterase.Calibration, float]:
        """A calibration at all sites, which serves all settings that only read it; and its processor seconds."""
        whole = resolve(acterase.Config(sites="all"), acterase.Settings)
        shared = dataclasses.replace(settings, **{name: getattr(whole, name) for name in READ})
        key = repr((concept, shared))
        if key not in self.calibrations:
            pairs = pairs_for(concept, settings.num_pairs, settings.preset, (), alone=True)
            drawn = {shot.prompt for shot in self.jobs[str(concept.target)].shots}
            assert not drawn & {right for _, right in pairs}, "a prompt is used in fitting and in testing"
            made = acterase.Calibration(self.pipe, shared, [pairs])
            begin = time.process_time()
            with erasures_disabled(self.pipe), inputs_seen(made.model, made.modules, made.see):
                for number in range(made.batches):
                    made.batch(0, number)
            self.calibrations[key] = made, time.process_time() - begin
        return self.calibrations[key]

    def score(self, name: str, changes: dict[str, Any]) -> Score:
        """Erase one concept by `BASE` with some changes, and draw."""
        changes = {**self.further, **changes}
        anchored = changes.pop("anchor", True)
        preset = "style" if name in STYLES else "object"
        config = acterase.Config(**{"preset": preset, **CALIBRATION, **BASE, **changes})
        settings = resolve(config, acterase.Settings)
        key = (name, anchored, repr(settings))
        if key not in self.scores:
            concept = self.concept(name, anchored)
            calibration, _ = self.calibration(concept, settings)
            tensors = calibration.tensors(settings)
            sites = tuple(sorted(name.removesuffix(MASK) for name in tensors if name.endswith(MASK)))
            layer = Layer("activation", sites, tensors)
            erasure = Erasure.from_layers([layer], base=self.base, concepts=concept, method="acterase")
            self.pipe.load_erasure(erasure, "one")
            erased, kept = self.draw(self.jobs[name])
            self.pipe.unload_erasure("one")
            self.scores[key] = Score(erased, kept, patched(calibration, settings, erasure), sizes(erasure))
        return self.scores[key]

    def draw(self, job: Job) -> tuple[float, float]:
        """The judge's accuracy on what was erased and on what is kept."""
        found = self.judge.predict(draw_shots(self.pipe, job.shots))
        seen = [Seen(*each, 1.0, 1.0) for each in zip(found.objects, found.styles, strict=True)]
        cells = ([is_seen(job, job.shots[i], seen[i]) for i in job.cell(cell)] for cell in ("erased", "kept"))
        erased, kept = (statistics.fmean(cell) for cell in cells)
        return erased, kept


def patched(calibration: acterase.Calibration, settings: acterase.Settings, erasure: Erasure) -> float:
    """Share of the units at the sites that is patched, over all timesteps."""
    (layer,) = erasure.config.layers
    tensors = erasure.layer_tensors(layer)
    units = sum(module.in_features for module in find_sites(calibration.model, settings).values())
    count = sum(value.numel() for name, value in tensors.items() if name.endswith(".means"))
    return count / (units * len(tensors["timesteps"]))


def sizes(erasure: Erasure) -> int:
    """Bytes of the tensor file."""
    return len(erasure.to_files()["erasure.safetensors"])


def main() -> None:
    parser = arguments(__doc__)
    known = [*SINGLES["dev"], *STYLE_HALVES["dev"]]
    parser.add_argument("--concepts", nargs="+", choices=known, default=["cat", "airplane", "noto"], metavar="CONCEPT")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), help="tables; all by default")
    parser.add_argument("--images", type=int, default=24, help="in each cell of a concept")
    options = parser.parse_args()
    start(options)
    tables = {name: TABLES[name] for name in options.only or TABLES}
    concepts, further, images = options.concepts, {}, options.images
    if options.smoke:
        tables, concepts, images = {"tau": TABLES["tau"][:2]}, concepts[:1], 2
        further = {"num_pairs": 2, "num_inference_steps": 3, "timesteps": 2}
    bench = Bench(concepts, images, further)
    bare = {name: bench.draw(bench.jobs[name]) for name in concepts}
    results: dict[str, list[dict[str, Any]]] = {}
    for table, settings in tables.items():
        rows: list[dict[str, Any]] = []
        for changes in settings:
            scores = {name: bench.score(name, changes) for name in concepts}
            own = {name: dataclasses.asdict(score) for name, score in scores.items()}
            erased, kept, share = (
                statistics.fmean(getattr(score, key) for score in scores.values())
                for key in ("erased", "kept", "patched")
            )
            rows.append(
                {"changes": changes, "erased": erased, "kept": kept, "patched": share, "concepts": own}
                | {"h_o": float(harmonic(1 - erased, kept))}
            )
            print(
                f"  {changes}: " + ", ".join(f"{n} {s.erased:.0%}/{s.kept:.0%}" for n, s in scores.items()), flush=True
            )
        results[table] = rows
        print_table(
            f"{table}: acc_e and acc_r in %, {images} images of each cell for each of {', '.join(concepts)}",
            ("setting", "acc_e", "acc_r", "H_o", "patched", *concepts),
            (
                (
                    ", ".join(f"{key}={value}" for key, value in row["changes"].items()),
                    *(f"{100 * row[key]:.1f}" for key in ("erased", "kept", "h_o", "patched")),
                    *(f"{100 * each['erased']:.0f}/{100 * each['kept']:.0f}" for each in row["concepts"].values()),
                )
                for row in rows
            ),
        )
    print("\nun-erased: " + ", ".join(f"{name} {e:.0%}/{k:.0%}" for name, (e, k) in bare.items()))
    seconds = [cost for _, cost in bench.calibrations.values()]
    print(f"a calibration of all sites: {statistics.median(seconds):.1f} processor seconds (median of {len(seconds)})")
    finish(options, "acterase_ablation", {"bare": bare, "tables": results, "calibration_s": seconds})


if __name__ == "__main__":
    main()
