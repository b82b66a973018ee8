# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: train a DeepSeek-style Mixture-of-Experts model
#
# Trains the quickstart on the Python standard library's own sources (nothing is downloaded), watches
# the losses and the experts' load, and samples from the result. Runs as it is on a laptop, in Colab
# and on a TPU VM. In Colab pick any runtime; on a TPU VM install with `pip install -e '.[tpu]'`.

# %%
import os
import pathlib
import subprocess
import sys

if not any((folder / "deepseek_jax").is_dir() for folder in (pathlib.Path(), pathlib.Path(".."))):
    sys.exit("Open this notebook from a clone: git clone the repository and `cd` into it first.")
if not pathlib.Path("deepseek_jax").is_dir():
    os.chdir("..")
try:
    import deepseek_jax
except ImportError:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "."], check=True)
    import deepseek_jax

# %% [markdown]
# ## Train
# About ten minutes on two CPU cores; `STEPS` caps it. Running the cell again resumes.

# %%
RUN = os.environ.get("DEEPSEEK_JAX_RUN", "runs/notebook")
STEPS = os.environ.get("DEEPSEEK_JAX_STEPS", "")
cap = ["--steps", STEPS, "--log-every", "1"] if STEPS else []
command = [sys.executable, "-m", "deepseek_jax.train", "--config", "configs/quickstart.py"]
with subprocess.Popen(
    [*command, "--run-dir", RUN, *cap], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
) as process:
    for line in process.stdout:
        print(line, end="")
assert process.returncode == 0, f"training ended with exit code {process.returncode}"

# %% [markdown]
# ## Watch
# The report holds losses, learning rate, throughput and the load of every expert over time.

# %%
from IPython.display import Image, display

from deepseek_jax.monitoring.report import write_report

page = write_report(RUN)
for picture in sorted(pathlib.Path(page).parent.glob("*.png")):
    display(Image(filename=str(picture)))

# %% [markdown]
# ## Sample
# Greedy and random continuations, with the latent cache of multi-head latent attention.

# %%
lm = deepseek_jax.load(RUN)
prompts = ["def read(self, size=-1):\n", "class Queue:\n"]
for prompt, completion in zip(prompts, lm.generate(prompts, max_new_tokens=48), strict=True):
    print(prompt + completion, "\n---")
print(lm.generate("import os\n", max_new_tokens=48, temperature=0.8, top_p=0.95, seed=1)[0])

# %% [markdown]
# ## Look inside
# Parameters are a plain tree of arrays; logits are one call.

# %%
tokens = lm.tokenizer.encode("import os\n")
print(lm.logits(tokens).shape, lm.config.attention)
print({name: leaf.shape for name, leaf in lm.params["embedding"].items()})
