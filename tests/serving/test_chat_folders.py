"""Reference: chats with Hugging Face folders are those of transformers. Round trip: converted ones.

Also whether a prompt begins with BOS: the folder's own rule.
"""

import dataclasses
import json

import hf_cases
import pytest
import tokenizers
import transformers
from tokenizers import processors

import deepseek_jax
from deepseek_jax import convert, generate
from deepseek_jax.checkpoint import huggingface
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.data.tokenizer import BPE, train_bpe

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about rope

BOS, EOS = "<|bos|>", "<|eos|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ '<think>' if thinking }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "def"}, {"role": "user", "content": "f(1)? 中"}]
BESIDE = {
    "chat_template.jinja": TEMPLATE,
    "chat_template.json": json.dumps({"chat_template": "not this one"}),
    "additional_chat_templates/rag.jinja": "nor this",
    "encoding/encoding_dsv32.py": "raise SystemExit('never run')\n",
    "encoding/tests/input.json": "{}",
}
NEW = 24


def bpe(post_processor=None) -> str:
    """A tokenizer.json whose role marks and <think> are added tokens that are not special."""
    lines = (f"def function_{n}(argument): return {n} * argument" for n in range(200))
    library = tokenizers.Tokenizer.from_buffer(train_bpe(BPE(vocab_size=300), lines).content)
    names = ("<user>", "<assistant>", "<system>", "<think>", "</think>")
    library.add_tokens([tokenizers.AddedToken(name, special=False) for name in names])
    if post_processor:
        library.post_processor = post_processor
    return library.to_str()


def first(token: str, number: int) -> processors.PostProcessor:
    """What puts a token before a text, as Llama 3's tokenizer.json does."""
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder, it converted to a checkpoint of ours, and that converted back."""
    root = tmp_path_factory.mktemp("chat")
    model = hf_cases.hf_model("v3", vocab_size=320, eos_token_id=None, bos_token_id=None)
    hf_cases.save(model, root / "hf")
    config = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": False}
    files = BESIDE | {"tokenizer.json": bpe(), "tokenizer_config.json": json.dumps(config)}
    for name, content in files.items():
        (root / "hf" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "hf" / name).write_text(content)
    convert.main(["from-hf", str(root / "hf"), str(root / "ours")])
    convert.main(["to-hf", str(root / "ours"), str(root / "back")])
    for name, content in files.items():
        assert (root / "back" / name).read_text() == content, name
    return root


@pytest.mark.parametrize("name", ["hf", "ours", "back"])
def test_answers_are_those_of_transformers(name, places):
    lm = deepseek_jax.load(places / name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        places / "hf", attn_implementation="eager", experts_implementation="eager"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(places / "hf")
    for thinking in (True, False):
        rows = theirs.apply_chat_template(
            MESSAGES, add_generation_prompt=True, thinking=thinking, return_tensors="pt"
        )
        row = rows["input_ids"][0].tolist()
        assert lm.chat_tokens(MESSAGES, thinking=thinking) == row
        done = model.generate(
            **rows, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=1
        )
        new = done[0, len(row) :].tolist()
        assert len(set(new)) > 4
        shown = []
        answer = lm.chat(MESSAGES, thinking=thinking, max_new_tokens=NEW, stream=shown.append)
        assert answer == "".join(shown) == lm.tokenizer.decode(new)
    assert lm.chat(MESSAGES, thinking=False, max_new_tokens=NEW, stop=answer[3:5]) == answer[:3]


def test_the_end_token_ends_an_answer(places):
    lm = deepseek_jax.load(places / "hf")
    new = lm.generate_tokens([lm.chat_tokens(MESSAGES)], max_new_tokens=NEW)[0]
    for changed in ({"ends": (new[6],)}, {"tokenizer": lm.tokenizer}):
        ending = dataclasses.replace(lm, **changed)
        if "tokenizer" in changed:
            ending.tokenizer.eos_id = new[6]
        expected = lm.tokenizer.decode(new[: new.index(new[6])])
        assert ending.chat(MESSAGES, max_new_tokens=NEW) == expected


def test_the_command_chats(places, capsys):
    lm = deepseek_jax.load(places / "ours")
    flags = ["--checkpoint", str(places / "ours"), "--max-new-tokens", "9", "--chat", "--prompt"]
    run_command(generate.main, [*flags, "f(1)? 中", "--system", "def", "--thinking"])
    assert capsys.readouterr().out == lm.chat(MESSAGES, thinking=True, max_new_tokens=9) + "\n"
    run_command(generate.main, [*flags, "a", "b"])
    asked = ([{"role": "user", "content": text}] for text in "ab")
    one, two = (lm.chat(messages, thinking=False, max_new_tokens=9) for messages in asked)
    assert capsys.readouterr().out == f"--- 'a'\n{one}\n--- 'b'\n{two}\n"


def test_the_command_refuses_a_chat_in_one_line(places, saved, capsys):
    for flags, message in (
        ([str(saved), "--chat"], "error: this checkpoint has no chat template"),
        ([str(places / "ours"), "--system", "x"], "error: --system and --thinking are for chats"),
        ([str(saved), "--audio", "x.wav"], f"error: {saved}: this model takes no audio: leave out"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run_command(generate.main, ["--prompt", "a", "--checkpoint", *flags])
        assert exit_.value.code == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith(message)
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "post_processor", "begins"),
    [
        (None, first(BOS, 0), True),  # Llama 3
        (None, None, False),
        (False, None, False),  # Qwen, DeepSeek-V3
        (True, None, True),  # DeepSeek-V2
        (True, first(BOS, 0), True),  # the distilled Llamas: one BOS, not two
        (None, first(EOS, 1), False),
    ],
)
def test_bos_by_the_folders_rule(flag, post_processor, begins, tmp_path):
    config = {"bos_token": BOS, "eos_token": EOS} | (
        {} if flag is None else {"add_bos_token": flag}
    )
    (tmp_path / "tokenizer.json").write_text(bpe(post_processor))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = huggingface.tokenizer_of(tmp_path)
    assert tokenizer.adds_bos == begins
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)("def").input_ids
    if flag is None:  # it ignores the flag, but not what tokenizer.json says
        assert (theirs[:1] == [tokenizer.bos_id]) == begins


def test_prompts_begin_as_the_folder_says(places):
    lm = deepseek_jax.load(places / "hf")
    ids = lm.tokenizer.encode("def f")
    ours = deepseek_jax.load(places / "ours")
    assert ours.tokenizer.adds_bos == lm.tokenizer.adds_bos is False
    assert ours.ends == lm.ends == (lm.tokenizer.eos_id,)
    for begins, row in ((False, ids), (True, [lm.tokenizer.bos_id, *ids])):
        lm.tokenizer.adds_bos = begins
        new = lm.generate_tokens([row], max_new_tokens=8)[0]
        assert lm.generate("def f", max_new_tokens=8) == [lm.tokenizer.decode(new)]


def test_ends_are_those_that_the_folder_names(tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe())
    ends = {"bos_token": {"content": "<system>"}, "eos_token": "<user>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(ends))
    tokenizer = huggingface.tokenizer_of(tmp_path)
    bos, end = tokenizer.encode_marked("<system><user>")
    assert tokenizer.bos_id == bos
    assert tokenizer.eos_id == 1  # a document's end by its usual name; an answer has two
    assert huggingface.end_ids(tmp_path, tokenizer) == (end,)
    for ids, found in ((7, (7, end)), ([7, 8], (7, 8, end))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert huggingface.end_ids(tmp_path, tokenizer) == found
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<nothing>"}))
    with pytest.raises(InputError, match="has no token '<nothing>'"):
        huggingface.tokenizer_of(tmp_path)
