"""Round trip and reference: conversions that are shared, killed and resumed give the same bytes."""

import collections
import errno
import hashlib
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import textwrap
import time

import hf_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint.experimental import v1 as ocp
from safetensors.torch import load_file

from deepseek_jax import convert
from deepseek_jax.checkpoint import huggingface, integrity, manager, params, parts, safetensors
from deepseek_jax.checkpoint.params import read_params
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.models.build import build
from deepseek_jax.models.decoder import layer_table

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARDS = ["--max-shard-size", "9KB"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of transformers, and both forms as conversions that nothing disturbed give them."""
    root = tmp_path_factory.mktemp("undisturbed")
    directory = hf_cases.save(hf_cases.hf_model("v2-lite"), root / "hf")
    convert.main(["from-hf", str(directory), str(root / "ours")])
    convert.main(["to-hf", str(root / "ours"), str(root / "back"), *SHARDS])
    return root


def contents(directory):
    """{name: bytes} of everything in a folder."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def commands(folders, target, part="1/1"):
    """Both directions' arguments, by the name of the undisturbed result."""
    arguments = {"ours": ["from-hf", "hf"], "back": ["to-hf", "ours"]}
    return {
        kind: [verb, str(folders / source), str(target), "--part", part] + SHARDS * (kind == "back")
        for kind, (verb, source) in arguments.items()
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("offset", [0, 8, 4096, 5003])
def test_what_is_written_is_what_numpy_says(tmp_path, monkeypatch, dtype, offset):
    """Turned, split over buffers, at any offset: the file, and the hash of it."""
    monkeypatch.setattr(parts, "BUFFER", 30_000)
    values = np.random.default_rng(0).standard_normal((3, 97, 170)).astype(np.float32)
    kind = jnp.dtype(dtype)
    for view in (values, values.T, values[1].T, values.transpose(1, 0, 2), values[:, 5:, 7:30]):
        path, expected = tmp_path / "file", np.ascontiguousarray(view.astype(kind)).tobytes()
        parts.reserve(path, offset + len(expected) + 9)
        digest = hashlib.sha256()
        parts.write_at(path, offset, view, kind, digest)
        assert path.read_bytes() == bytes(offset) + expected + bytes(9)
        assert digest.hexdigest() == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_every_piece_is_in_one_part(count):
    sizes = [random.Random(count).randrange(1, 100) for _ in range(20)]
    pieces = [parts.Piece(str(i), None, [(size, None)]) for i, size in enumerate(sizes)]
    shares = parts._shares(pieces, count)
    assert len(shares) == count
    assert [i for share in shares for i in share] == list(range(20))
    for share in shares:
        assert abs(sum(sizes[i] for i in share) - sum(sizes) / count) <= 100


@pytest.mark.parametrize("kind", ["ours", "back"])
def test_parts_in_any_order_make_the_whole(folders, tmp_path, capsys, kind):
    for part, needs in (("3/3", "1/3, 2/3"), ("1/3", "2/3"), ("1/3", "2/3"), ("2/3", None)):
        before = sorted(path.stat().st_mtime_ns for path in tmp_path.glob("new.parts/done/*"))
        convert.main(commands(folders, tmp_path / "new", part)[kind])
        said = capsys.readouterr().out
        if needs:
            assert f"still needs --part {needs}\n" in said and not (tmp_path / "new").exists()
            marks = sorted(path.stat().st_mtime_ns for path in tmp_path.glob("new.parts/done/*"))
            assert marks[: len(before)] == before and (part != "3/3") == bool(before)
        else:
            assert said == f"{tmp_path / 'new'}: written\n"
    assert contents(tmp_path / "new") == contents(folders / kind)
    with pytest.raises(InputError, match="exists; choose"):
        convert.main(commands(folders, tmp_path / "new", "1/3")[kind])
    assert contents(tmp_path / "new") == contents(folders / kind)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("kind", ["ours", "back"])
@pytest.mark.parametrize("place", ["write", "finish", "rename"])
def test_what_is_whole_is_not_written_again(folders, tmp_path, monkeypatch, kind, place):
    """The disk is full, half-way or when only the small files are missing."""
    calls, write = [], parts.write_at

    def counted(*arguments):
        if place == "write" and len(calls) == 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        calls.append(arguments)
        write(*arguments)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module in (params, safetensors):
        monkeypatch.setattr(module, "write_at", counted)
    command = commands(folders, tmp_path / "new")[kind]
    with monkeypatch.context() as patch:
        if place == "finish":
            patch.setattr(huggingface if kind == "back" else integrity, "sync", full)
        if place == "rename":
            patch.setattr(pathlib.Path, "rename", full)
        with pytest.raises(InputError, match="No space left"):
            convert.main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["new.parts"]
    done, calls[:], place = len(calls), [], ""
    convert.main(command)
    assert contents(tmp_path / "new") == contents(folders / kind)
    assert len(calls) == 0 if done > 60 else 0 < len(calls) < done


def test_parts_of_another_conversion_are_not_taken_up(folders, tmp_path):
    """Another folder's, another dtype's, and shards of another size."""
    other = hf_cases.save(hf_cases.hf_model("v2-lite", 1), tmp_path / "other")
    new = str(tmp_path / "new")
    convert.main(["from-hf", str(other), new, "--part", "1/2"])
    convert.main([*commands(folders, new, "1/2")["ours"], "--dtype", "bfloat16"])
    convert.main(commands(folders, new, "2/2")["ours"])
    convert.main(commands(folders, new, "1/2")["ours"])
    assert contents(tmp_path / "new") == contents(folders / "ours")
    convert.main([*commands(folders, new + "2", "1/2")["back"], "--max-shard-size", "20KB"])
    convert.main(commands(folders, new + "2", "2/2")["back"])
    convert.main(commands(folders, new + "2", "1/2")["back"])
    assert contents(tmp_path / "new2") == contents(folders / "back")


def test_what_a_kill_left_of_a_complete_conversion_goes(folders, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new.parts/done").mkdir(parents=True)
    with pytest.raises(InputError, match="exists; choose"):
        convert.main(commands(folders, tmp_path / "new")["ours"])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3"])
def test_parts_that_are_none(folders, tmp_path, part):
    with pytest.raises(InputError, match="not a part such as 2/4"):
        convert.main(commands(folders, tmp_path / "new", part)["ours"])
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_leaves_nothing(folders, tmp_path):
    whole = contents(folders / "ours")
    for name, content in whole.items():
        path = tmp_path / "ours" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[:-1] if name.endswith("head.weight/0.0") else content)
    with pytest.raises(InputError, match="head.weight/0.0 does not match"):
        convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "new")])
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


WORKING = """
    import sys, time
    from deepseek_jax import convert
    from deepseek_jax.checkpoint import parts

    def slow(*_):
        print("at work", flush=True)
        time.sleep(60)

    parts._written = slow
    convert.main(sys.argv[1:])
"""


def started(code, arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_do_not_write_the_same_part(folders, tmp_path, capsys):
    process = started(WORKING, commands(folders, tmp_path / "new", "1/2")["ours"])
    assert process.stdout.readline() == "at work\n"
    try:
        for part in ("1/2", "1/1", "2/3"):  # it holds some pieces of each
            with pytest.raises(InputError, match=f"another process is at work on part {part} of"):
                convert.main(commands(folders, tmp_path / "new", part)["ours"])
        with pytest.raises(InputError, match="another process is at work"):  # of another origin
            convert.main(
                [*commands(folders, tmp_path / "new", "2/2")["ours"], "--dtype", "float16"]
            )
        convert.main(commands(folders, tmp_path / "new", "2/2")["ours"])
        assert "still needs --part 1/2" in capsys.readouterr().out
    finally:
        process.kill()
        process.communicate()
    convert.main(commands(folders, tmp_path / "new", "1/2")["ours"])
    assert contents(tmp_path / "new") == contents(folders / "ours")


def test_orbax_opens_a_converted_checkpoint_as_it_opens_a_saved_one(folders, tmp_path, monkeypatch):
    """Leaves of several files and a last one that is not full included."""
    monkeypatch.setattr(params, "BUFFER", 1000)
    convert.main(commands(folders, tmp_path / "new")["ours"])
    assert len(list((tmp_path / "new/state/params.embedding.weight").glob("*.0"))) > 10
    assert "does not match" not in integrity.damage(tmp_path / "new")
    folder = huggingface.open_folder(folders / "hf")
    model = build(folder.config, Precision(compute="float32"))
    expected = manager._to_disk(huggingface.load_params(folder, model, model.shapes), layers(model))
    loaded = manager.tree.flatten(ocp.load(tmp_path / "new")["params"])
    stored = read_params(tmp_path / "new")
    assert loaded.keys() == expected.keys() == stored.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array)
        np.testing.assert_array_equal(stored[name].read(()), array)
        np.testing.assert_array_equal(stored[name].read((1,)), array[1])
    back = manager.load_params(tmp_path / "new", model.shapes, layers(model))
    theirs = huggingface.load_params(folder, model, model.shapes)
    jax.tree.map(np.testing.assert_array_equal, back, theirs)


def layers(model):
    return layer_table(model.config)


def test_training_s_own_checkpoints_are_read_leaf_by_leaf(folders, tmp_path):
    """Orbax's database, a file of which holds several experts."""
    folder = huggingface.open_folder(folders / "hf")
    model = build(folder.config, Precision(compute="float32"))
    params = huggingface.load_params(folder, model, model.shapes)
    saver = manager.Manager(tmp_path, manager.Checkpoint(), layers(model))
    saver.save(3, {"params": params}, position=3, config={"type": "X"}, files={})
    saver.close()
    assert (tmp_path / "3/state/manifest.ocdbt").exists()
    found = read_params(tmp_path / "3")
    for name, array in manager._to_disk(params, layers(model)).items():
        np.testing.assert_array_equal(found[name].read(()), array)
        np.testing.assert_array_equal(found[name].read((1,)), array[1])


def all_tensors(directory):
    """In the order of the file."""
    found = load_file(directory / "model.safetensors")
    return {name: found[name] for name in safetensors.mapped(directory / "model.safetensors")}


@pytest.mark.parametrize("name", ["qwen2-tied", "v3"])
def test_one_file_of_pytorch(tmp_path, monkeypatch, name):
    """What the safetensors form holds, and what another kind of reader makes of it."""
    directory = hf_cases.save(hf_cases.hf_model(name), tmp_path / "hf")
    convert.main(["from-hf", str(directory), str(tmp_path / "ours"), "--dtype", "bfloat16"])
    convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "safe")])
    command = ["to-hf", str(tmp_path / "ours"), str(tmp_path / "torch"), "--format", "torch"]
    with monkeypatch.context() as patch:  # killed at the last moment, then taken up
        patch.setattr(pathlib.Path, "rename", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert.main(command)
    convert.main(command)
    found = torch.load(tmp_path / "torch/pytorch_model.bin", weights_only=True)
    wanted = all_tensors(tmp_path / "safe")
    assert list(found) == list(wanted)
    for key, tensor in wanted.items():
        assert tensor.dtype == found[key].dtype and tensor.shape == found[key].shape, key
        assert torch.equal(tensor.view(torch.uint8), found[key].view(torch.uint8)), key
        assert found[key].untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    assert contents(tmp_path / "torch").keys() == {"pytorch_model.bin", "config.json"} | {
        file for file in contents(tmp_path / "safe") if not file.endswith("safetensors")
    }
    convert.main(["from-hf", str(tmp_path / "torch"), str(tmp_path / "again")])
    for leaf, source in read_params(tmp_path / "ours").items():
        again = read_params(tmp_path / "again")[leaf].read(())
        assert again.tobytes() == source.read(()).tobytes(), leaf


def killed(kind, source, target, more):
    """Two processes, a part each, started and killed again and again; how often that was."""
    code = """
        import sys, time
        from deepseek_jax import convert
        from deepseek_jax.checkpoint import parts

        sync = parts.sync
        parts.sync = lambda path: (time.sleep(0.02), sync(path))  # or it were done too soon
        convert.main(sys.argv[1:])
    """
    kills, rng = 0, random.Random(kind)
    commands = [[kind, str(source), str(target), *more, "--part", f"{i}/2"] for i in (1, 2)]
    marks = target.with_name(f"{target.name}.parts") / "done"
    for _ in range(7):
        before = len(list(marks.glob("*")))
        processes = [started(code, command) for command in commands]
        while len(list(marks.glob("*"))) == before and processes[0].poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        kills += all(process.returncode == -signal.SIGKILL for process in processes)
        if target.exists():
            break
    for command in commands * (not target.exists()):
        if not target.exists():
            convert.main(command)
    return kills


@pytest.mark.slow
def test_killed_at_random_moments_the_result_is_the_same(tmp_path):
    """SIGKILL to both parts, five times each way; byte for byte what an undisturbed run writes."""
    shape = {"num_hidden_layers": 12, "moe_intermediate_size": 64}
    directory = hf_cases.save(hf_cases.hf_model("v2-lite", **shape), tmp_path / "hf")
    small = ["--max-shard-size", "60KB"]
    convert.main(["from-hf", str(directory), str(tmp_path / "ours")])
    convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back"), *small])
    assert killed("from-hf", directory, tmp_path / "ours2", []) >= 5
    assert contents(tmp_path / "ours2") == contents(tmp_path / "ours")
    assert killed("to-hf", tmp_path / "ours", tmp_path / "back2", small) >= 5
    assert contents(tmp_path / "back2") == contents(tmp_path / "back")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["back", "back2", "hf", "ours", "ours2"]


MEASURED = """
    import pathlib, sys, threading, time
    from deepseek_jax import convert
    from deepseek_jax.checkpoint import params, parts, safetensors

    for module in (params, parts, safetensors):
        module.BUFFER = 2**22
    own = lambda: int(pathlib.Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])
    peak, start, at_work = 0, own(), True

    def watch():
        global peak
        while at_work:
            peak = max(peak, own())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    convert.main(sys.argv[1:])
    at_work = False
    thread.join()
    print((peak - start) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A tenth of 300 MB, and 30 MB for shaping the model: 2 GB of 20 would be as much."""
    shape = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 6}
    directory = hf_cases.save(hf_cases.hf_model("v2-lite", **shape), tmp_path / "hf")
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert size > 2.5e8
    for command in (["from-hf", "hf", "ours"], ["to-hf", "ours", "back"]):
        arguments = [command[0], *(str(tmp_path / name) for name in command[1:])]
        process = started(MEASURED, arguments)
        grown = int(process.communicate()[0].splitlines()[-1])
        assert process.returncode == 0 and grown < size / 10 + 3e7, (command, grown / 1e6)


def mapped_bytes(maps):
    """How much of some mapped files this process has touched, by the maps' addresses."""
    starts = {array.__array_interface__["data"][0] & -4096 for array in maps}
    touched, inside = 0, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            inside = int(match[1], 16) in starts
        elif inside and line.startswith("Rss:"):
            touched += int(line.split()[1]) * 1024
    return touched


def sharded(model, mesh):
    """The model's shapes, experts and the embedding's rows apart on eight devices."""

    def place(path, leaf):
        spec = {"embedding/weight": ("x",)}.get(path, ())
        if "/experts/" in path:
            spec = (None, "x")
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return tree.map_with_path(place, model.shapes)


def test_a_mesh_reads_what_its_devices_need(tmp_path):
    """Eight devices together touch each expert and each row of the embedding once."""
    shape = {"hidden_size": 256, "vocab_size": 32768, "moe_intermediate_size": 512}
    directory = hf_cases.save(hf_cases.hf_model("v2-lite", **shape), tmp_path / "hf")
    folder = huggingface.open_folder(directory)
    model = build(folder.config, Precision(compute="float32"))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    abstract, maps = sharded(model, mesh), collections.defaultdict(list)

    def kept(name, tensor):
        def read():
            maps[name].append(tensor.read())
            return maps[name][-1]

        return tensor._replace(read=read)

    tensors = {name: kept(name, tensor) for name, tensor in folder.tensors.items()}
    params = huggingface.load_params(folder._replace(tensors=tensors), model, abstract)
    embedding = maps["model.embed_tokens.weight"]
    assert len(embedding) == 8  # a device each
    for array in embedding:
        assert mapped_bytes([array]) <= array.nbytes / 8 + 2**22  # the kernel maps 2 MB at once
    experts = [name for name in maps if ".experts." in name]
    assert len(experts) == 2 * 3 * 8 and all(len(maps[name]) == 1 for name in experts)

    convert.main(["from-hf", str(directory), str(tmp_path / "ours")])
    size = sum(array.nbytes for array in jax.tree.leaves(params))
    before = bytes_read()
    back = manager.load_params(tmp_path / "ours", abstract, layers(model))
    assert size <= bytes_read() - before < size * 1.02  # not eight times the shared ones
    jax.tree.map(np.testing.assert_array_equal, back, params)
    for leaf, source in read_params(tmp_path / "ours").items():
        if "/experts/" in leaf:
            before = bytes_read()
            source.read((3,))
            assert bytes_read() - before <= math.prod(source.shape) * 4 / 8 + 2000


def bytes_read():
    """By TensorStore, from files, so far."""
    name = "/tensorstore/kvstore/file/bytes_read"
    found = tensorstore.experimental_collect_matching_metrics(name)
    return sum(value["value"] for metric in found for value in metric["values"])
