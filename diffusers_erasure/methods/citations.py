"""The papers of the methods, for cards: plain data, so that a card needs no method's code."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Citation:
    """A method's paper. `bibtex` is its entry, as authors would paste it."""

    title: str
    year: int
    url: str
    bibtex: str


CITATIONS: dict[str, Citation] = {
    "uce": Citation(
        title="Unified Concept Editing in Diffusion Models",
        year=2024,
        url="https://arxiv.org/abs/2308.14761",
        bibtex="""\
@inproceedings{gandikota2024unified,
  title={Unified Concept Editing in Diffusion Models},
  author={Gandikota, Rohit and Orgad, Hadas and Belinkov, Yonatan and Materzy{\\'n}ska, Joanna and Bau, David},
  booktitle={Proceedings of the IEEE/CVF Winter Conference on Applications of Computer Vision},
  year={2024}
}""",
    ),
}
