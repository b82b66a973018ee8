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
# # From PyTorch and back
#
# Opens a Hugging Face folder as it is, holds its logits and its completions against transformers',
# fine-tunes it, and writes a folder that transformers opens again. Five minutes with a tiny model
# made on the spot; with a real checkpoint only `SOURCE` and `CONFIG` below change.

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
    import torch
    import transformers

    import deepseek_jax
except ImportError:
    packages = ["-e", ".", "torch", "transformers"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)
    import torch
    import transformers

    import deepseek_jax

# %% [markdown]
# ## A folder
# Llama, Qwen2, Qwen3, DeepSeekMoE, V2, V3 and V3.2 folders open, in safetensors or `.bin` files, float8 or not. A
# real one, in Colab (a GPU runtime, and `pip install -e '.[gpu]'`):
#
# ```python
# from huggingface_hub import snapshot_download
# SOURCE = snapshot_download("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
# CONFIG = "configs/deepseek_r1_distill_qwen_1_5b.py"
# ```
#
# Here it is a DeepSeek-V3 of four narrow layers with random weights, and a tokenizer trained on this
# package, both saved as transformers saves them.

# %%
RUN = pathlib.Path(os.environ.get("DEEPSEEK_JAX_RUN", "runs/from_and_to_pytorch")).absolute()
STEPS = os.environ.get("DEEPSEEK_JAX_STEPS", "100")
SOURCE, CONFIG = None, None
transformers.utils.logging.disable_progress_bar()

if SOURCE is None:
    import tokenizers

    SOURCE = RUN / "hf"
    bpe = tokenizers.ByteLevelBPETokenizer()
    texts = (path.read_text() for path in sorted(pathlib.Path("deepseek_jax").rglob("*.py")))
    bpe.train_from_iterator(
        texts, vocab_size=1024, special_tokens=["<s>", "</s>"], show_progress=False
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(SOURCE)
    shape = transformers.DeepseekV3Config(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, n_group=1,
        topk_group=1, num_experts_per_tok=2, moe_intermediate_size=128, first_k_dense_replace=1,
        initializer_range=0.08, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.DeepseekV3ForCausalLM(shape).save_pretrained(SOURCE)
print(*sorted(path.name for path in pathlib.Path(SOURCE).iterdir()))

# %% [markdown]
# ## Open it
# One call. What comes back holds the tokenizer, a frozen config, and the weights as a plain tree of
# arrays; nothing of the folder is ever executed.

# %%
lm = deepseek_jax.load(SOURCE)
print(lm.config.attention, lm.config.moe, sep="\n")

# %% [markdown]
# Where PyTorch's tensors are: a matrix is stored input first, heads and experts have dimensions of
# their own, and the layers of a kind are stacked.

# %%
from deepseek_jax.checkpoint import names

ours = names.leaves(lm.model)
print(f"{'in the folder':55s} {'[out, in]':>14s}   here, by layer")
for row in names.table(lm.config, ours)[:14]:
    there = "x".join(map(str, names.their_shape(row, ours)))
    here = ", ".join(f"{path} {'x'.join(map(str, ours[path].shape))}" for path in row.ours)
    print(f"{row.theirs:55s} {there:>14s}   {here}")

# %% [markdown]
# ## The same logits
# Beside transformers in float32, at every position of a text. On a GPU or TPU a folder is opened in
# bfloat16 if it is stored so, and differs by that.

# %%
theirs = transformers.AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
text = pathlib.Path("deepseek_jax/core/errors.py").read_text()
tokens = lm.tokenizer.encode(text)[:256]
with torch.no_grad():
    expected = theirs(torch.tensor([tokens])).logits[0].numpy()

import matplotlib.pyplot as plt
import numpy as np

found = np.asarray(lm.logits(tokens))[0]
apart = np.abs(found - expected).max(-1)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
left.plot(expected.reshape(-1)[::97], found.reshape(-1)[::97], ".", markersize=2)
left.set(xlabel="logit in transformers", ylabel="logit here")
right.semilogy(apart)
right.set(xlabel="position", ylabel="largest difference")
plt.show()
print(f"largest difference {apart.max():.1e}, of logits up to {np.abs(expected).max():.1f}")

# %% [markdown]
# ## The same completions
# Greedy, two prompts of unequal length in one batch, with MLA's latent cache.

# %%
prompts = [tokens[:7], tokens[:40]]
done = lm.generate_tokens(prompts, max_new_tokens=24)
for prompt, new in zip(prompts, done, strict=True):
    with torch.no_grad():
        whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    print("the same tokens:", whole[0, len(prompt) :].tolist() == new, new[:8], "...")

# %% [markdown]
# ## Fine-tune
# `train --init-from FOLDER` starts from its weights. The config says the rest; a released model has one
# in `configs/`, and this one reads the tiny folder's shape from the folder itself. Any field is a flag.

# %%
if CONFIG is None:
    CONFIG = RUN / "fine_tune.py"
    CONFIG.write_text(f'''"""Fine-tunes the folder on this package's own sources."""

from deepseek_jax.checkpoint.huggingface import open_folder
from deepseek_jax.data.loader import Data
from deepseek_jax.data.sources import TextFiles
from deepseek_jax.data.tokenizer import TokenizerFile
from deepseek_jax.training.optimizer import AdamW
from deepseek_jax.training.recipe import TrainConfig


def get_config() -> TrainConfig:
    folder = {str(SOURCE)!r}
    return TrainConfig(
        model=open_folder(folder).config,
        data=Data(
            source=TextFiles(paths=("deepseek_jax/**/*.py",)), tokenizer=TokenizerFile(path=folder)
        ),
        optimizer=AdamW(learning_rate=3e-3, warmup_steps=5),
        steps=100,
        batch_size=16,
        sequence_length=128,
        init_from=folder,
    )
''')
command = [sys.executable, "-m", "deepseek_jax.train", "--config", CONFIG, "--init-from", SOURCE]
with subprocess.Popen(
    [*map(str, command), "--run-dir", str(RUN / "run"), "--steps", STEPS],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
) as process:  # fmt: skip
    for line in process.stdout:
        print(line, end="")
assert process.returncode == 0, f"training ended with exit code {process.returncode}"

# %% [markdown]
# ## Back to PyTorch
# `convert to-hf` writes safetensors, config.json and the tokenizer's files; `--dtype bfloat16` or
# `float8-block` if they should be smaller. transformers opens them, and so does whatever reads its folders.

# %%
EXPORTED = RUN / "exported"
if not EXPORTED.exists():
    subprocess.run(
        [sys.executable, "-m", "deepseek_jax.convert", "to-hf", str(RUN / "run"), str(EXPORTED)],
        check=True,
    )
back, info = transformers.AutoModelForCausalLM.from_pretrained(
    EXPORTED, dtype=torch.float32, output_loading_info=True
)
print({kind: len(found) for kind, found in info.items() if kind.endswith("_keys")})
trained = deepseek_jax.load(RUN / "run")
ids = torch.tensor([tokens])
with torch.no_grad():
    apart = np.abs(back(ids).logits[0].numpy() - np.asarray(trained.logits(tokens))[0]).max()
    before, after = (model(ids, labels=ids).loss.item() for model in (theirs, back))
print(f"largest difference of the logits {apart:.1e}")
print(f"loss in transformers, before {before:.3f} and after {after:.3f}")

# %%
tokenizer = transformers.AutoTokenizer.from_pretrained(EXPORTED)
prompt = tokenizer("def ", return_tensors="pt")
drawn = back.generate(**prompt, max_new_tokens=40, do_sample=True, temperature=0.7)[0]
print("transformers:", tokenizer.decode(drawn))
print("here:        ", "def " + trained.generate("def ", max_new_tokens=40, temperature=0.7)[0])
