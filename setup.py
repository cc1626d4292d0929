"""Packaging of lorapre_dist; the versions that the project is tested with are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

setup(
    name="lorapre-dist",
    version="0.1.0",
    description="LoRA-Pre (low-rank Adam momentum) as a ZeRO-aware distributed optimizer for DeepSpeed",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["lorapre_dist", "lorapre_dist.*"]),
    entry_points={"console_scripts": ["lorapre = lorapre_dist.cli:main"]},
    python_requires=">=3.10",
    # Lower bounds are the major versions whose interfaces are used; older ones have not been tried.
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19,<0.20",
        # With which DeepSpeed reads and checks its configuration
        "hjson>=3.1",
        "pydantic>=2",
        "transformers>=5.0,<6",
        "datasets>=4.0,<6",
        "tokenizers>=0.22",
        "numpy>=1.26",
        "filelock>=3.12",
        "psutil>=5.9",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        # DeepSpeed compiles a small CPU collective on first use.
        "ninja>=1.11",
    ],
    extras_require={
        # The Hugging Face Trainer and Accelerate; 1.6 brought FSDP2
        "hf": ["accelerate>=1.6"],
        # LoRA as a baseline; loading a model under ZeRO-3
        "finetune": ["peft>=0.15", "accelerate>=1.6"],
        "test": [
            "accelerate>=1.6",
            "galore-torch>=1.0",
            "peft>=0.15",
            "mpi4py>=3.1",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
        ],
        # Rank discovery under a plain mpirun and deepspeed --launcher openmpi
        "mpi": ["mpi4py>=3.1"],
        "bench": ["galore-torch>=1.0"],
        "docs": ["sphinx>=9", "myst-parser>=5", "furo>=2025.12"],
        "wandb": ["wandb>=0.17"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
