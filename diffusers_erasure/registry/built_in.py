"""The methods that come with the library, as data. A new one is a file in `methods/` and an entry here."""

from ..families import FAMILIES
from .declaration import Citation, MethodDeclaration


UNETS = ("stable-diffusion", "stable-diffusion-xl")
TRANSFORMERS = ("stable-diffusion-3", "flux")
ALL = tuple(FAMILIES)  # an edit of the text rows, wherever they enter
METHODS = "diffusers_erasure.methods"

# `python -m diffusers_erasure.methods.catalogue` writes down again what is told about them.
BUILT_IN: tuple[MethodDeclaration, ...] = (
    MethodDeclaration(
        name="abo",
        module=f"{METHODS}.abo",
        summary="All but One (AAAI 2024), an experimental reconstruction: what guidance adds is led to an alternative's, the rest is held; as a LoRA",
        families=UNETS + TRANSFORMERS,
        needs="base weights",
        makes=("lora",),
        trains=True,
        resumable=True,
        citation=Citation(
            title="All but One: Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models",
            year=2024,
            url="https://arxiv.org/abs/2312.12807",
            bibtex="""\
@inproceedings{hong2024all,
  title={All but One: Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models},
  author={Hong, Seunghoo and Lee, Juhun and Woo, Simon S.},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2024}
}""",
        ),
    ),
    MethodDeclaration(
        name="acterase",
        module=f"{METHODS}.acterase",
        summary="ActErase (2026): activations that carry the concept are replaced by their means without it; no training, minutes",
        families=UNETS + TRANSFORMERS,
        needs="base weights",
        makes=("activation",),
        resumable=True,
        instead_of_retain="It spares the rest by changing few units: at most the share `top`, none whose importance without the "
        "concept lies below the quantile `tau`, and each only as far as `blend` says.",
        citation=Citation(
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
    ),
    MethodDeclaration(
        name="dp",
        module=f"{METHODS}.dp",
        summary="Double Projections (CVPR 2026): UCE's map with what is retained projected out of it; seconds, no training",
        families=ALL,
        needs="text encoders",
        makes=(
            "text_map",
            "lora",
        ),
        citation=Citation(
            title="Closed-Form Concept Erasure via Double Projections",
            year=2026,
            url="https://arxiv.org/abs/2604.10032",
            bibtex="""\
@inproceedings{zhang2026closed,
  title={Closed-Form Concept Erasure via Double Projections},
  author={Zhang, Chi and Cheng, Jingpu and Wang, Zhixian and Liu, Ping},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2026}
}""",
        ),
    ),
    MethodDeclaration(
        name="dumo",
        module=f"{METHODS}.dumo",
        summary="DuMo (AAAI 2025): a network beside the encoder that adds to the skip connections, and its schedule; minutes",
        families=UNETS,
        needs="base weights",
        makes=("skip",),
        trains=True,
        resumable=True,
        citation=Citation(
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
    ),
    MethodDeclaration(
        name="eap",
        module=f"{METHODS}.eap",
        summary="EAP (NeurIPS 2024): fine-tuning away from the concept while what that hurts most is searched for and preserved; minutes",
        families=UNETS + TRANSFORMERS,
        needs="base weights",
        makes=("lora",),
        trains=True,
        resumable=True,
        citation=Citation(
            title="Erasing Undesirable Concepts in Diffusion Models with Adversarial Preservation",
            year=2024,
            url="https://arxiv.org/abs/2410.15618",
            bibtex="""\
@inproceedings{bui2024erasing,
  title={Erasing Undesirable Concepts in Diffusion Models with Adversarial Preservation},
  author={Bui, Anh and Vuong, Long and Doan, Khanh and Le, Trung and Montague, Paul and Abraham, Tamas and Phung, Dinh},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}""",
        ),
    ),
    MethodDeclaration(
        name="eraseanything",
        module=f"{METHODS}.eraseanything",
        summary="EraseAnything (ICML 2025): ESD with less attention to the word, in turn with steps that keep the rest, as a LoRA; minutes",
        families=TRANSFORMERS,
        needs="base weights",
        makes=("lora",),
        trains=True,
        resumable=True,
        citation=Citation(
            title="EraseAnything: Enabling Concept Erasure in Rectified Flow Transformers",
            year=2025,
            url="https://arxiv.org/abs/2412.20413",
            bibtex="""\
@inproceedings{gao2025eraseanything,
  title={{EraseAnything: Enabling Concept Erasure in Rectified Flow Transformers}},
  author={Gao, Daiheng and Lu, Shilin and Walters, Shaw and Zhou, Wenbo and Chu, Jiaming and Zhang, Jie and Zhang, Bang and Jia, Mengxi and Zhao, Jian and Fan, Zhaoxin and Zhang, Weiming},
  booktitle={International Conference on Machine Learning},
  year={2025}
}""",
        ),
    ),
    MethodDeclaration(
        name="esd",
        module=f"{METHODS}.esd",
        summary="ESD (ICCV 2023): fine-tuning away from the concept by the base's own guidance, as a LoRA; minutes",
        families=UNETS + TRANSFORMERS,
        needs="base weights",
        makes=("lora",),
        trains=True,
        resumable=True,
        citation=Citation(
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
    ),
    MethodDeclaration(
        name="gated",
        module=f"{METHODS}.gated",
        summary="this library's gated text edit: probes see whether a prompt names a concept, and only then its rows are mapped; seconds",
        families=ALL,
        needs="text encoders",
        makes=("gated_map",),
    ),
    MethodDeclaration(
        name="gem",
        module=f"{METHODS}.gem",
        summary="GEM (ICML 2026): towards the anchor and away from the concept, along the student's own way, as a LoRA; minutes",
        families=TRANSFORMERS,
        needs="base weights",
        makes=("lora",),
        trains=True,
        resumable=True,
        citation=Citation(
            title="GEM: Geometric Erasure by Contrastive Velocity Matching in Rectified Flows",
            year=2026,
            url="https://arxiv.org/abs/2606.00140",
            bibtex="""\
@inproceedings{grebe2026gem,
  title={{GEM: Geometric Erasure by Contrastive Velocity Matching in Rectified Flows}},
  author={Grebe, Jonas Henry and Braun, Tobias and Rohrbach, Anna and Rohrbach, Marcus},
  booktitle={International Conference on Machine Learning},
  year={2026}
}""",
        ),
    ),
    MethodDeclaration(
        name="oce",
        module=f"{METHODS}.oce",
        summary="OCE (ICML 2026): each layer's values turned away from the concept by an orthogonal matrix, as a LoRA; seconds",
        families=ALL,
        needs="text encoders",
        makes=("lora",),
        citation=Citation(
            title="Orthogonal Concept Erasure for Diffusion Models",
            year=2026,
            url="https://arxiv.org/abs/2605.28902",
            bibtex="""\
@inproceedings{sun2026orthogonal,
  title={Orthogonal Concept Erasure for Diffusion Models},
  author={Sun, Yuhao and Yu, Lingyun and Xu, Haoxiang and Miao, Fengyuan and Xu, Zhuoer and Xie, Hongtao},
  booktitle={International Conference on Machine Learning},
  year={2026}
}""",
        ),
    ),
    MethodDeclaration(
        name="rece",
        module=f"{METHODS}.rece",
        summary="RECE (ECCV 2024): UCE, then further closed-form edits against rows that still reach the target",
        families=ALL,
        needs="text encoders",
        makes=(
            "text_map",
            "lora",
        ),
        citation=Citation(
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
    ),
    MethodDeclaration(
        name="receler",
        module=f"{METHODS}.receler",
        summary="Receler (ECCV 2024): small adapters behind the attentions that read text, trained against rows that bring the concept back",
        families=UNETS + TRANSFORMERS,
        needs="base weights",
        makes=("adapter", "lora"),
        trains=True,
        resumable=True,
        citation=Citation(
            title="Receler: Reliable Concept Erasing of Text-to-Image Diffusion Models via Lightweight Erasers",
            year=2024,
            url="https://arxiv.org/abs/2311.17717",
            bibtex="""\
@inproceedings{huang2024receler,
  title={Receler: Reliable Concept Erasing of Text-to-Image Diffusion Models via Lightweight Erasers},
  author={Huang, Chi-Pin and Chang, Kai-Po and Tsai, Chung-Ting and Lai, Yung-Hsuan and Yang, Fu-En and Wang, Yu-Chiang Frank},
  booktitle={European Conference on Computer Vision},
  year={2024}
}""",
        ),
    ),
    MethodDeclaration(
        name="sdd",
        module=f"{METHODS}.sdd",
        summary="SDD (ICML workshop 2023): self-distillation towards the empty prompt, averaged, as a LoRA; minutes",
        families=UNETS + TRANSFORMERS,
        needs="base weights",
        makes=("lora",),
        trains=True,
        resumable=True,
        citation=Citation(
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
    ),
    MethodDeclaration(
        name="speed",
        module=f"{METHODS}.speed",
        summary="SPEED (ICLR 2026): closed-form edit of the values in the null space of what is retained; seconds",
        families=ALL,
        needs="text encoders",
        makes=(
            "lora",
            "text_map",
        ),
        citation=Citation(
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
    ),
    MethodDeclaration(
        name="uce",
        module=f"{METHODS}.uce",
        summary="UCE (WACV 2024): closed-form edit of what reads the text rows; seconds, no training",
        families=ALL,
        needs="text encoders",
        makes=(
            "text_map",
            "lora",
        ),
        citation=Citation(
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
    ),
)
