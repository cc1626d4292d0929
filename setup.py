"""Packaging of lorapre_dist; the versions that the project is tested with are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
FRONT_PAGE = (HERE / "lorapre_dist" / "__init__.py").read_text(encoding="utf-8")

# Lower bounds are the major versions whose interfaces are used; older ones have not been tried. What is imported of an
# extra is in lorapre_dist/config/extras.py.
DEEPSPEED = [
    "deepspeed>=0.19,<0.20",
    # With which DeepSpeed reads and checks its configuration
    "hjson>=3.1",
    "pydantic>=2",
    # DeepSpeed compiles a small CPU collective on first use.
    "ninja>=1.11",
]
TRANSFORMERS = ["transformers>=5.0,<6"]
# 1.6 brought FSDP2
ACCELERATE = ["accelerate>=1.6"]
TRAIN = [
    *DEEPSPEED,
    *TRANSFORMERS,
    "datasets>=4.0,<6",
    "tokenizers>=0.22",
    "filelock>=3.12",
    "psutil>=5.9",
    "tqdm>=4.66",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
]
EXTRAS = {
    "deepspeed": DEEPSPEED,
    # lorapre pretrain, tokenize and launch; plots
    "train": TRAIN,
    # The Hugging Face Trainer and Accelerate, without DeepSpeed
    "hf": [*TRANSFORMERS, *ACCELERATE],
    # lorapre finetune: LoRA as a baseline; loading a model under ZeRO-3
    "finetune": [*TRAIN, *ACCELERATE, "peft>=0.15"],
    # Rank discovery under a plain mpirun and lorapre launch --launcher openmpi
    "mpi": ["mpi4py>=3.1"],
    # Other optimizers beside ours. Asked for by name are torchao, which transformers then imports, too, and says much
    # about on stderr, and ista-daslab-optimizers, which needs CUDA and brings torchvision.
    "bench": [*TRAIN, "galore-torch>=1.0", "fira>=1.0", "pytorch-optimizer>=4.1", "bitsandbytes>=0.50"],
}
# Everything that is used; wandb, the client of a service, is asked for by name.
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
EXTRAS["wandb"] = ["wandb>=0.17"]
EXTRAS["test"] = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.7",
    "pytest-cov>=7",
    # Its interpreter runs the kernel on a CPU. PyTorch for CUDA brings its own.
    "triton>=3.2; sys_platform == 'linux'",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "mypy>=1.14",
    "packaging>=23",
    "setuptools>=77",
]
EXTRAS["docs"] = ["sphinx>=9", "myst-parser>=5", "furo>=2025.12"]

setup(
    name="lorapre-dist",
    version=re.search(r'^__version__ = "(.+)"$', FRONT_PAGE, re.MULTILINE)[1],
    description="LoRA-Pre (low-rank Adam momentum) as a ZeRO-aware distributed optimizer for DeepSpeed and PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["lorapre_dist", "lorapre_dist.*"]),
    # Links to ds_configs/ and launch/, whose files a wheel holds.
    package_data={"lorapre_dist": ["py.typed", "shipped/*.*", "shipped/ds_configs/*.json"]},
    entry_points={"console_scripts": ["lorapre = lorapre_dist.cli:main"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy>=1.26"],
    extras_require=EXTRAS,
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
