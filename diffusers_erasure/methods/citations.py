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
    "acterase": Citation(
        title="ActErase: A Training-Free Paradigm for Precise Concept Erasure via Activation Patching",
        year=2026,
        url="https://arxiv.org/abs/2601.00267",
        bibtex="""\
@article{sun2026acterase,
  title={{ActErase: A Training-Free Paradigm for Precise Concept Erasure via Activation Patching}},
  author={Sun, Yi and Zhong, Xinhao and Li, Hongyan and Zhou, Yimin and Li, Junhao and Chen, Bin and Wang, Xuan},
  journal={arXiv preprint arXiv:2601.00267},
  year={2026}
}""",
    ),
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
    "rece": Citation(
        title="Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models",
        year=2024,
        url="https://arxiv.org/abs/2407.12383",
        bibtex="""\
@inproceedings{gong2024reliable,
  title={Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models},
  author={Gong, Chao and Chen, Kai and Wei, Zhipeng and Chen, Jingjing and Jiang, Yu-Gang},
  booktitle={European Conference on Computer Vision},
  year={2024}
}""",
    ),
    "speed": Citation(
        title="SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models",
        year=2026,
        url="https://arxiv.org/abs/2503.07392",
        bibtex="""\
@inproceedings{li2026speed,
  title={{SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models}},
  author={Li, Ouxiang and others},
  booktitle={International Conference on Learning Representations},
  year={2026}
}""",
    ),
    "esd": Citation(
        title="Erasing Concepts from Diffusion Models",
        year=2023,
        url="https://arxiv.org/abs/2303.07345",
        bibtex="""\
@inproceedings{gandikota2023erasing,
  title={Erasing Concepts from Diffusion Models},
  author={Gandikota, Rohit and Materzy{\\'n}ska, Joanna and Fiotto-Kaufman, Jaden and Bau, David},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2023}
}""",
    ),
    "sdd": Citation(
        title="Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models",
        year=2023,
        url="https://arxiv.org/abs/2307.05977",
        bibtex="""\
@inproceedings{kim2023towards,
  title={Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models},
  author={Kim, Sanghyun and Jung, Seohyeon and Kim, Balhae and Choi, Moonseok and Shin, Jinwoo and Lee, Juho},
  booktitle={ICML 2023 Workshop on Challenges in Deployable Generative AI},
  year={2023}
}""",
    ),
    "dumo": Citation(
        title="DuMo: Dual Encoder Modulation Network for Precise Concept Erasure",
        year=2025,
        url="https://arxiv.org/abs/2501.01125",
        bibtex="""\
@inproceedings{han2025dumo,
  title={DuMo: Dual Encoder Modulation Network for Precise Concept Erasure},
  author={Han, Feng and Chen, Kai and Gong, Chao and Wei, Zhipeng and Chen, Jingjing and Jiang, Yu-Gang},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2025}
}""",
    ),
}
