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
# # Plan a pod: will it fit, and how fast can it be?
#
# Before anyone pays for a pod: `plan` compiles a config's training step with the real TPU compiler,
# for chips that are not here, and says what each one would hold, send and compute. Needs the package
# `libtpu` (`pip install -e '.[test]'` brings it) and a Linux machine with an x86 processor. GPU meshes
# need no compiler of their own and are estimates.

# %%
import json
import os
import pathlib
import subprocess
import sys

if not any((folder / "deepseek_jax").is_dir() for folder in (pathlib.Path(), pathlib.Path(".."))):
    sys.exit("Open this notebook from a clone: git clone the repository and `cd` into it first.")
if not pathlib.Path("deepseek_jax").is_dir():
    os.chdir("..")

# %% [markdown]
# ## What to plan
# DeepSeek-V2-Lite on 32 chips of v5p. In tests it is the quickstart on four chips.

# %%
TINY = os.environ.get("DEEPSEEK_JAX_STEPS", "")
CONFIG = "configs/quickstart.py" if TINY else "configs/deepseek_v2_lite.py"
TOPOLOGY, GPUS = ("v5e:2x2", "h100:8") if TINY else ("v5p:2x4x4", "h100:32")
FEW = ["--model.num-layers=2", "--model.num-mtp-layers=0"] if TINY else []
MESH = ["--mesh.data=1", f"--mesh.fsdp={4 if TINY else 32}"]
SIZE = ["--batch-size=16"] if TINY else ["--batch-size=128", "--model.remat=full"]
OUT = pathlib.Path(os.environ.get("DEEPSEEK_JAX_RUN", "runs/plans"))
OUT.mkdir(parents=True, exist_ok=True)


def plan(*flags, topology=TOPOLOGY):
    """The command's answer; what does not fit is an answer too."""
    command = [sys.executable, "-m", "deepseek_jax.plan", "--config", CONFIG]
    command += ["--topology", topology, "--quick", "--json", *FEW, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.returncode in (0, 1), "its message stands above"
    return json.loads(done.stdout)


# %% [markdown]
# ## A first plan
# Bytes by kind, every collective with the mesh axes that it joins, and the bounds of a step.

# %%
from deepseek_jax.monitoring.plans import ranking, table

first = plan(*MESH, *SIZE, "--picture", str(OUT / "first.png"))
print(table(first))

# %%
from IPython.display import Image, display

display(Image(filename=str(OUT / "first.png")))

# %% [markdown]
# ## Lighter
# Layer inputs and the optimizer's moments can wait in the host's memory; moments can be bfloat16.

# %%
LIGHTER = {
    "layer inputs on the host": ["--model.remat=offload"],
}
if not TINY:
    LIGHTER["moments on the host"] = ["--optimizer.memory=pinned_host"]
    LIGHTER["moments in bfloat16"] = [
        "--optimizer.momentum-dtype=bfloat16", "--optimizer.variance-dtype=bfloat16"
    ]  # fmt: skip
print(f"{'as above':28} {first['memory']['total'] / 1e9:8.3f} GB")
for name, flags in LIGHTER.items():
    memory = plan(*MESH, *SIZE, *flags)["memory"]
    print(f"{name:28} {memory['total'] / 1e9:8.3f} GB, on the host {memory['host'] / 1e9:.3f}")

# %% [markdown]
# ## The best of many
# `--search` weighs meshes, remat policies and batch sizes by formula and compiles the best few.

# %%
found = plan("--search", f"--compiles={1 if TINY else 6}")
print(f"{found['candidates']} candidates, {found['compiled']} compiled")
print(ranking(found["plans"]))

# %% [markdown]
# ## The same on GPUs: an estimate
# The partitioned program is real, chip and kernels are not: bytes of temporaries are approximate.

# %%
gpus = [f"--mesh.fsdp={8 if TINY else 32}", "--mesh.data=1", *SIZE]
print(table(plan(*gpus, topology=GPUS)))
