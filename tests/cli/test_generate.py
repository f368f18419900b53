"""Text from a trained model: opening it, pieces of text, and the command line."""

import contextlib
import io
import json
import random
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from mythos.checkpoints.stored_model import OpenedModel, open_model
from mythos.cli import generate as command
from mythos.config.model_paths import run_directory
from mythos.data.tokenizer import Tokenizer
from mythos.errors import MythosError
from mythos.files.storage import RemoteStorage
from mythos.generation import text
from mythos.generation.depth_view import PALETTE, coloured, harmless, html_page, legend, shade
from mythos.generation.sampling import Sampling
from mythos.generation.text import Piece, PieceStream, TextGeneration, TextRow, choose_depth, generate_text
from mythos.hf.export import export_model
from mythos.model import rdt
from mythos.model.halting import Act, Convergence, SecondDifference
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.trainer import Trainer
from tests.runs import tiny
from tests.trainers import run, saved

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, no_plots: None) -> Trainer:
    """A run of four steps with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("generate")
    samples = {"eval__samples": 1, "eval__prompts": ["The river crosses the garden. " * 15]}
    return run(tiny(folder, checkpoint__every=2, optim__lr=0.02, depth__mean=2, **samples))


@pytest.fixture(scope="module")
def opened(trained: Trainer) -> OpenedModel:
    return open_model(trained.run_dir)


@pytest.fixture
def generate(trained: Trainer, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command on the run; returns status, standard output and standard error."""

    def call(*arguments: str, path: Path | str = trained.run_dir) -> tuple[int, str, str]:
        status = command.main([str(path), *arguments])
        return status, *capsys.readouterr()

    return call


# Opening


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_opened_at_its_newest_checkpoint(trained: Trainer, opened: OpenedModel) -> None:
    assert_same(weights(opened.model), weights(trained.model))
    assert not opened.model.training and opened.step == 4 and opened.mean_loops == 2
    assert opened.tokenizer is not None and opened.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert opened.run is not None and opened.run.model == trained.config.model
    assert opened.source == str(saved(trained, 4))


def test_a_sample_of_training_continues_the_end_of_a_prompt_longer_than_the_context(trained: Trainer) -> None:
    prompt, sample_ids = "The river crosses the garden. " * 15, trained.tokenizer.encode_batch(trained.samples)[0]
    assert len(trained.tokenizer.encode_batch([prompt])[0]) > 64 >= len(sample_ids)
    assert prompt[-50:] in trained.samples[0] and not trained.samples[0].endswith(prompt[-50:])


def test_an_older_checkpoint_is_opened_by_its_path(trained: Trainer, opened: OpenedModel) -> None:
    older = open_model(saved(trained, 2))
    assert older.step == 2 and older.tokenizer is not None
    newer, values = weights(opened.model), weights(older.model)
    assert any(not torch.equal(newer[name], values[name]) for name in newer)
    assert_same(weights(open_model(f"{saved(trained, 4)}/").model), newer)


def test_a_run_may_be_called_like_a_checkpoint(trained: Trainer, tmp_path: Path) -> None:
    checkpoint = copy_of(trained, tmp_path / "step-7")
    assert open_model(tmp_path / "step-7").source == str(checkpoint)
    assert run_directory(tmp_path / "step-7") == run_directory(checkpoint) == tmp_path / "step-7"
    assert run_directory(tmp_path) is None and run_directory("memory://a/checkpoints/step-00000004") is None


def test_a_run_that_checkpoints_elsewhere(trained: Trainer, tmp_path: Path) -> None:
    """The path of a checkpoint alone leads to its run's tokenizer; a URL of fsspec is fetched."""
    with far_away(saved(trained, 4)) as url:
        far = open_model(url)
    assert_same(weights(far.model), weights(trained.model))
    assert far.tokenizer is not None

    moved = tmp_path / "copy" / "step-00000004"
    shutil.copytree(saved(trained, 4), moved)
    assert open_model(moved).tokenizer is not None


def copy_of(trained: Trainer, folder: Path) -> Path:
    """The newest checkpoint in a run directory of its own."""
    shutil.copytree(saved(trained, 4), folder / "checkpoints" / "step-00000004")
    shutil.copy(trained.run_dir / "config.yaml", folder / "config.yaml")
    shutil.copytree(trained.run_dir / "tokenizer", folder / "tokenizer")
    return folder / "checkpoints" / "step-00000004"


def test_what_cannot_be_opened(
    trained: Trainer, opened: OpenedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MythosError, match=r"missing: no such file or folder\. Give a run directory"):
        open_model(tmp_path / "missing")
    with pytest.raises(MythosError, match="it is not a model"):
        open_model(tmp_path)
    with pytest.raises(MythosError, match="step-00000003 is no complete checkpoint"):
        open_model(saved(trained, 3))
    with pytest.raises(MythosError, match=r"cannot be read: .*File name too long"):
        open_model(tmp_path / ("a" * 300))
    monkeypatch.setattr(RemoteStorage, "exists", Mock(side_effect=RuntimeError("no permission")))
    with pytest.raises(MythosError, match="step-00000003 cannot be read: no permission"):
        open_model("memory://nowhere/step-00000003")

    checkpoint = copy_of(trained, tmp_path / "run")
    (checkpoint / "committed").unlink()
    with pytest.raises(MythosError, match="the run has no complete checkpoint yet"):
        open_model(tmp_path / "run")


def write_meta(checkpoint: Path, meta: dict[str, object]) -> None:
    """Change meta.json as if it had been written so."""
    text = json.dumps(meta)
    (checkpoint / "meta.json").write_text(text)
    (checkpoint / "committed").write_text(json.dumps({"meta_crc32": zlib.crc32(text.encode())}))


@contextlib.contextmanager
def far_away(checkpoint: Path) -> Iterator[str]:
    """A copy in an object store."""
    import fsspec

    memory, root = fsspec.filesystem("memory"), "/elsewhere-generate"
    memory.put(str(checkpoint), f"{root}/{checkpoint.name}", recursive=True)
    try:
        yield f"memory:/{root}/{checkpoint.name}"
    finally:
        memory.rm(root, recursive=True)


def test_no_memory_is_asked_for_before_shapes_are_known_to_fit(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes far beyond any memory, and beyond what a tensor can have at all."""
    monkeypatch.setattr(RecurrentDepthTransformer, "to_empty", None)
    checkpoint, folder = copy_of(trained, tmp_path / "run"), tmp_path / "export"
    export_model(trained.run_dir, folder)
    config, meta = json.loads((folder / "config.json").read_text()), json.loads((checkpoint / "meta.json").read_text())
    for changes, message in [
        ({"ffn_dim": 2**20}, "does not fit its own configuration: .*tensors differ"),
        ({"core_layers": 2**10}, "does not fit its own configuration: .*more layers than"),
        ({"ffn_dim": 2**40}, r"ffn_dim: .*1048576"),
        ({"ffn_dim": 2**62}, r"ffn_dim: .*1048576"),
        ({"dim": 2**40}, r"dim: .*1048576"),
        ({"core_layers": 10**12}, r"core_layers: .*1024"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | changes))
        values = meta["config"] | {"model": meta["config"]["model"] | changes}
        write_meta(checkpoint, meta | {"config": values})
        for path in (folder, checkpoint):
            with pytest.raises(MythosError, match=message):
                open_model(path)


def test_damage_is_found(trained: Trainer, tmp_path: Path) -> None:
    checkpoint = copy_of(trained, tmp_path / "run")
    [shard] = checkpoint.glob("*.safetensors")
    whole = shard.read_bytes()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(MythosError, match=f"damaged: {shard.name}: its bytes are not those that were written"):
        open_model(checkpoint)
    with far_away(checkpoint) as url, pytest.raises(MythosError, match=f"{shard.name}: its bytes are not those"):
        open_model(url)
    shard.unlink()
    with pytest.raises(MythosError, match=r"damaged: .*No such file"):
        open_model(checkpoint)
    with far_away(checkpoint) as url, pytest.raises(MythosError, match=r"step-00000004 cannot be fetched: "):
        open_model(url)

    # Where there are no checksums, as in earlier versions.
    meta = json.loads((checkpoint / "meta.json").read_text())
    write_meta(checkpoint, {key: value for key, value in meta.items() if key != "files"})
    with pytest.raises(MythosError, match=r"does not fit its own configuration: .* in the file"):
        open_model(checkpoint)
    for end in (4, len(whole) // 2):
        shard.write_bytes(whole[:end])
        with pytest.raises(MythosError, match="step-00000004 is damaged: "):
            open_model(checkpoint)


# Pieces of text


@pytest.fixture(scope="module")
def tokenizer(trained: Trainer) -> Tokenizer:
    return trained.tokenizer


def random_rows(tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Ids of which many are lone bytes, so that characters come in pieces or not at all."""
    draw = random.Random(0)
    smile = tokenizer.encode_batch(["naïve 深い 😀"])[0]
    for _ in range(60):
        ids = [draw.choice([draw.randrange(tokenizer.size), draw.randrange(1, 257)]) for _ in range(12)]
        place = draw.randrange(12)
        yield ids[:place] + smile + ids[place:]


def test_pieces_join_to_the_text_and_are_never_half_a_character(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode_batch(["The café"])[0]
    for ids in random_rows(tokenizer):
        stream = PieceStream(tokenizer, prompt, ())
        for token in ids:
            stream.push(token, 1)
            assert not "".join(piece.text for piece in stream.pieces).endswith("\ufffd")
        stream.finish()
        whole = tokenizer.decode(prompt + ids)
        assert "The café" + "".join(piece.text for piece in stream.pieces) == whole


def byte_fallback(folder: Path) -> Tokenizer:
    """A tokenizer as of Llama 2: words with marked beginnings, and bytes for all else."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=names)
    backend.train_from_iterator(["the loop runs again"] * 20, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content)), eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return Tokenizer.load(folder)


def test_pieces_of_a_tokenizer_with_byte_fallback(tmp_path: Path) -> None:
    """A byte that is a letter alone is none beside one that continues nothing."""
    coder = byte_fallback(tmp_path)
    ids = coder.backend.get_vocab()
    draw = random.Random(0)
    word = max((name for name in ids if name.startswith("▁")), key=len)
    names = ["▁", word, "o", "<0x20>", "<0x41>", "<0xC3>", "<0xA9>", *(f"<0x{byte:02X}>" for byte in range(256))]
    smile = [ids[f"<0x{byte:02X}>"] for byte in "😀".encode()]
    rows = [[ids["<0x51>"], ids["<0x80>"], ids["▁"]], [ids["▁"], *smile, ids[word]]]
    rows += [[ids[draw.choice(names[: draw.choice((7, len(names)))])] for _ in range(12)] for _ in range(200)]
    prompt = coder.encode_batch(["the loop"])[0]
    for row in rows:
        assert "the loop" + streamed(coder, prompt, row) == coder.decode(prompt + row)
    # The bytes of the prompt's last character are that character, whatever bytes follow.
    assert streamed(coder, coder.encode_batch(["the é"])[0], [ids["<0x80>"], ids["o"]]) == "\ufffdo"


def streamed(coder: Tokenizer, prompt: list[int], row: list[int]) -> str:
    stream = PieceStream(coder, prompt, ())
    for token in row:
        stream.push(token, 1)
    stream.finish()
    return "".join(piece.text for piece in stream.pieces)


def test_a_piece_has_the_most_loops_of_its_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_batch(["😀a"])[0]
    assert len(ids) > 2
    stream = PieceStream(tokenizer, [tokenizer.eos_id], ())
    for token, loops in zip(ids, [3, 7, *[2] * len(ids)], strict=False):
        stream.push(token, loops)
    assert stream.pieces == [Piece("😀", 7), Piece("a", 2)]


@pytest.mark.parametrize("stops", [["\n"], ["river fin"], ["er", "い river"], ["é 深"], ["nowhere", "xyz"], ["."]])
def test_text_ends_before_the_first_stop_string(tokenizer: Tokenizer, stops: list[str]) -> None:
    text = "garden crosses the é 深い river finds the river.\nThe end"
    ids = tokenizer.encode_batch([text])[0]
    places = [text.find(stop) for stop in stops if stop in text]
    cut = text[: min(places)] if places else text
    stream = PieceStream(tokenizer, [tokenizer.eos_id], stops)
    for count, token in enumerate(ids, start=1):
        stream.push(token, 1)
        said = "".join(piece.text for piece in stream.pieces)
        assert cut.startswith(said), "nothing of a stop string is handed out"
        assert len(tokenizer.decode(ids[:count])) - len(said) <= max(map(len, stops)) + 8, "nor much held back"
        if stream.stopped:
            break
    stream.finish()
    assert stream.stopped == bool(places)
    assert "".join(piece.text for piece in stream.pieces) == cut


# Depth, in colours


def test_colours_go_from_few_loops_to_many() -> None:
    assert [shade(loops, 7) for loops in range(1, 8)] == list(range(len(PALETTE)))
    assert shade(1, 1) == 0 and shade(64, 64) == shade(80, 64) == len(PALETTE) - 1
    assert legend(5) == [1, 2, 3, 4, 5]
    assert legend(64)[0] == 1 and legend(64)[-1] == 64 and len(legend(64)) <= 14
    assert coloured(Piece("on", 1), 8) == "\x1b[38;5;33mon\x1b[0m"


def test_no_escape_sequence_of_a_model_reaches_the_terminal() -> None:
    assert harmless("a\x1b[2J\x07\x9b1m\n\tz") == "a␛[2J␇\ufffd1m\n\tz"


class Page(HTMLParser):
    """What a browser would show of a page, and the classes and titles it met."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.titles, self.tags = "", [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_escaped_and_whole() -> None:
    row = TextRow("<script>alert('p')</script> & ", 4, [Piece("<b>", 1), Piece(" &amp;\n", 4)], [1, 4, 4])
    generation = TextGeneration([row], 5, 0.1, 0.5, 2048, halting=True)
    page = html_page(generation, "a <title>")
    shown = Page(page)
    assert "<script>alert('p')</script> & <b> &amp;\n" in shown.text
    assert shown.tags <= {"html", "head", "meta", "title", "style", "body", "h1", "p", "span", "footer", "pre"}
    assert shown.titles == ["1 loop", "4 loops"]
    assert "loops: 1 4\n" in shown.text, "counts that did not occur are not named"
    assert "     1 loop        1  ####################\n     4 loops       2" in shown.text
    assert "http" not in page, "nothing is loaded from elsewhere"
    assert "3.00 loops per token on average of 4 (25% saved); cache 2.0 KiB" in shown.text


def test_the_numbers_of_a_generation() -> None:
    rows = [TextRow("a", 8, loops=[2, 4, 6], end="stop"), TextRow("b", 4, loops=[4], end="stop")]
    generation = TextGeneration(rows, 7, 1.0, 3.0, 3 * 2**20, halting=True)
    assert generation.tokens == 4 and generation.mean_loops == 4.0
    assert generation.tokens_per_second == 1.0, "two tokens after the first of each row, in two seconds"
    assert generation.summary() == (
        "4 tokens at 1.0 tokens/s, after 7 prompt tokens in 1.00 s; ended: 2 x end of document\n"
        "4.00 loops per token on average of 7 (43% saved); cache 3.0 MiB"
    )
    rows = [TextRow("a", 8, loops=[8, 8])]
    assert "average; cache" in TextGeneration(rows, 1, 0.1, 0.5, 0).summary()
    assert "average of 8 (0% saved); cache" in TextGeneration(rows, 1, 0.1, 0.5, 0, halting=True).summary()
    assert "0.00 loops" in TextGeneration([TextRow("a", 8)], 1, 0.1, 0.5, 0, halting=True).summary()


def test_what_halts_at_given_loops(opened: OpenedModel) -> None:
    assert choose_depth(opened, [3]) == ([3], None) and choose_depth(opened, None, "none") == ([2], None)
    limits, rule = choose_depth(opened, None)
    assert limits == [2] and isinstance(rule, Convergence)
    assert isinstance(choose_depth(opened, [9], "second_difference").rule, SecondDifference)
    assert choose_depth(opened, [9], threshold=0.3).rule.threshold == 0.3
    act = RecurrentDepthTransformer(opened.model.config.model_copy(update={"halting": "act"}))
    assert isinstance(choose_depth(replace(opened, model=act), [3]).rule, Act), "its output is the average"


# The command line


def test_text_goes_to_standard_output_and_nothing_else(generate: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = generate("--prompt", "The river", "--tokens", "9", "--loops", "3")
    assert status == 0 and out.startswith("The river") and out.endswith("\n")
    assert "9 tokens at" in err and "3.00 loops per token" in err and "tokens/s" in err and "cache" in err
    assert generate("--prompt", "The river", "--tokens", "9", "--loops", "3")[1] == out
    assert generate("--prompt", "The river", "--tokens", "9", "--loops", "3", "--seed", "1")[1] != out


def test_what_the_command_prints_is_what_the_model_says(
    generate: Callable[..., tuple[int, str, str]], opened: OpenedModel
) -> None:
    """Greedy text against forward passes over the whole context."""
    tokenizer = opened.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode_batch(["The garden"])[0]
    for _ in range(8):
        with torch.no_grad():
            logits = opened.model(torch.tensor([ids]), loops=3).logits[0, -1, : tokenizer.size]
        ids.append(int(logits.argmax()))
    out = generate("--prompt", "The garden", "--tokens", "8", "--loops", "3", "--temperature", "0")[1]
    assert out == tokenizer.decode(ids) + "\n"


def test_several_prompts_and_depths(generate: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("A letter\r\n", newline="")
    single = ("--tokens", "5", "--top-k", "0", "--loops")
    status, out, err = generate("--prompt", "The", "--prompt-file", str(tmp_path / "p.txt"), *single, "1,4")
    assert status == 0 and "2 x the requested number of tokens" in err and "2.50 loops per token" in err
    first, second = out.split("== ")[1:]
    assert first.startswith("1 of 2, 1 loop\nThe") and second.startswith("2 of 2, 4 loops\nA letter")
    assert first.partition("\n")[2].strip("\n") == generate("--prompt", "The", *single, "1")[1].strip("\n")

    out = generate("--prompt-file", str(tmp_path / "p.txt"), "--prompt", "The", *single, "4,1")[1]
    assert [part.splitlines()[1][:3] for part in out.split("== ")[1:]] == ["A l", "The"], (
        "in the order of the command line"
    )

    out = generate("--prompt", "The", *single, "1,1,6")[1].split("== ")[1:]
    texts = [part.partition("\n")[2] for part in out]
    assert len(texts) == 3 and texts[0] == texts[1], "one prompt at several depths has the same draws"


def test_a_prompt_from_standard_input_or_none(
    generate: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("naïve\n".encode("utf-8-sig"))))
    assert generate("--prompt-file", "-", "--tokens", "2")[1].startswith("naïve"), "without the byte order mark"
    status, out, err = generate("--tokens", "3")
    assert status == 0 and out.strip() and "after 1 prompt tokens" in err


def test_a_stop_string_ends_the_text(generate: Callable[..., tuple[int, str, str]]) -> None:
    arguments = ("--prompt", "The", "--tokens", "30", "--loops", "2")
    whole = generate(*arguments)[1].removesuffix("\n")
    stop = whole[8:10]
    status, out, err = generate(*arguments, "--stop", "never said", "--stop", stop)
    assert status == 0 and out == whole[: 3 + whole[3:].index(stop)] + "\n" and "ended: stop string" in err


def test_depth_is_shown_without_colours_where_there_is_no_terminal(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    page = tmp_path / "depth.html"
    halting = ("--halting", "convergence", "--exit-threshold", "1e9")
    arguments = ("--prompt", "The", "--tokens", "6", "--loops", "5", *halting)
    plain = generate(*arguments)[1]
    picture = tmp_path / "depth.svg"
    status, out, err = generate(*arguments, "--show-depth", "--html", str(page), "--picture", str(picture))
    assert picture.read_text().startswith("<?xml") and f"picture: {picture}" in err
    assert status == 0 and "\x1b" not in out
    assert out.replace("[1]", "") == plain and "[1]" in out, "so high a threshold stops all after the first loop"
    assert "1.00 loops per token on average of 5 (80% saved)" in err and "1 loop        6" in err
    assert plain.strip() in Page(page.read_text()).text


def test_colours_are_for_terminals(
    generate: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ("--prompt", "The", "--tokens", "4", "--loops", "4", "--show-depth")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, err = generate(*arguments)
    assert f"\x1b[38;5;{PALETTE[-1][0]}m" in out and "loops: \x1b[" in err
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    plain = generate(*arguments)[1]
    # Tokens that only together make a character are shown as one, and which these are depends on the text.
    assert "\x1b" not in plain and 1 <= plain.count("[4]") == out.count("\x1b[0m") <= 4


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    out = capsys.readouterr().out
    for option in ("--loops", "--exit-threshold", "--show-depth", "--cache-loops", "--stop", "examples:"):
        assert option in out


def test_compiled_text_is_the_same(
    generate: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Mock(wraps=RecurrentDepthTransformer.run_packed)
    monkeypatch.setattr(rdt, "_compiled_run_packed", lambda device: step)
    arguments = ("--prompt", "The river", "--tokens", "9", "--loops", "3")
    assert generate(*arguments, "--compile")[1] == generate(*arguments)[1]
    assert step.call_count == 8, "the first token comes with the prompt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loops", "0"], "--loops: got '0'; give auto, or whole numbers of at least 1"),
        (["--loops", "-4"], "--loops: got '-4'"),
        (["--loops", "many"], "--loops: got 'many'"),
        (["--halting", "gate"], "halting: got 'gate', and this model was trained with model.halting=convergence"),
        (["--prompt", ""], "--prompt: the prompt is empty"),
        (["--prompt", "word " * 80], "tokens, and the model's context is 64: shorten it"),
        (["--prompt-file", "no/such/file"], "--prompt-file: no/such/file cannot be read as UTF-8 text"),
        (["--top-k", "385"], "top-k: got 385; allowed: at most the vocabulary, "),
        (
            ["--loops", "65536", "--tokens", "10000"],
            "GiB of memory are free: give fewer --loops, or keep fewer of them (--cache-loops)",
        ),
        (["--top-p", "0"], "top-p: got 0.0; allowed: above 0 and at most 1"),
        (["--min-p", "1.5"], "min-p: got 1.5"),
        (["--temperature", "-1"], "temperature: got -1.0; allowed: at least 0"),
        (["--repetition-penalty", "0"], "repetition penalty: got 0.0"),
        (["--compile"], "--compile: got a halting rule that stops tokens; allowed: as many loops for all"),
        (["--compile", "--loops", "1,2"], "--compile: got several depths; allowed: as many loops for all"),
    ],
)
def test_bad_input_is_told_in_a_line(
    generate: Callable[..., tuple[int, str, str]], arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mythos.generation.text.available_memory", lambda device: 2**30)
    status, out, err = generate("--prompt", "a", *arguments)
    assert status == 1 and message in err and out == ""
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loops", "1,2,3", "--prompt", "b"], "3 loop counts for 2 prompts"),
        (["--tokens", "0"], "--tokens: got 0; give at least 1"),
        (["--exit-threshold", "0"], "--exit-threshold: got 0; allowed: a number above 0"),
        (["--exit-threshold", "nan"], "--exit-threshold: got nan; allowed: a number above 0"),
        (["--exit-threshold", "1.5", "--halting", "act"], "got 1.5; allowed for act: above 0 and at most 1"),
        (["--halting", "boredom"], "--halting: got 'boredom'; allowed: none, "),
        (["--halting", "none", "--exit-threshold", "0.1"], "got 0.1 and --halting none, which has no threshold"),
        (["--stop", ""], "--stop: the text is empty"),
        (["--top-k", "-1"], "--top-k: got -1; give at least 0"),
        (["--seed", "-1"], "--seed: got -1; give at least 0"),
        (["--prefill-chunk", "0"], "--prefill-chunk: got 0; give at least 1"),
        (["--cache-loops", "0"], "--cache-loops: got 0; give at least 1"),
        (["--html", "no/such/folder/a.html"], "--html: there is no folder"),
        (["--html", ""], "--html: got no name; give a file"),
        (["--picture", "no/such/folder/a.svg"], "--picture: there is no folder"),
        (["--picture", "a.pdf"], "--picture: got a.pdf; give a file that ends in .svg or .png"),
        (["--html", "."], "--html: . is a folder; give a file in it"),
        (["--device", "cuda"], "--device is cuda, but torch finds no CUDA GPU: set --device=auto or cpu"),
    ],
)
def test_what_no_model_could_do_is_told_before_one_is_loaded(
    generate: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.yaml").touch()
    status, out, err = generate("--prompt", "a", *arguments, path=str(tmp_path))
    assert status == 1 and err.startswith("error: ") and message in err and out == ""
    assert len(err.splitlines()) == 1


def test_far_more_loops_than_trained_are_warned_of(generate: Callable[..., tuple[int, str, str]]) -> None:
    arguments = ("--prompt", "The", "--tokens", "1", "--loops")
    assert "warning" not in generate(*arguments, "16")[2]
    status, _, err = generate(*arguments, "17")
    assert status == 0 and "warning: 17 loops for a model trained with 2 on average" in err


def test_a_cache_that_does_not_fit_is_refused(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by a byte less than the cache then takes; deeper ones by keeping fewer loops."""

    def generated(loops: int = 40, **options: int) -> TextGeneration:
        return generate_text(opened, ["The"], 3, choose_depth(opened, [loops]), sampling=Sampling(), **options)

    taken = generated().cache_bytes
    monkeypatch.setattr(text, "available_memory", lambda device: taken)
    assert generated().cache_bytes == taken == generated(80, cache_loops=40).cache_bytes
    with pytest.raises(MythosError, match=r"tokens at 41 loops, and .* of memory are free: give fewer --loops"):
        generated(41)
    monkeypatch.setattr(text, "available_memory", lambda device: taken - 1)
    with pytest.raises(MythosError, match=r"the cache would take up to .* for 1 x \d+ tokens at 40 loops"):
        generated()


def test_a_path_that_is_no_model(generate: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, _, err = generate("--prompt", "a", path=tmp_path)
    assert status == 1 and "it is not a model. Give a run directory" in err


def test_a_model_without_text_is_told(trained: Trainer, tmp_path: Path) -> None:
    copy_of(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    opened = open_model(tmp_path / "run")
    assert opened.tokenizer is None
    with pytest.raises(MythosError, match="has no tokenizer"):
        generate_text(opened, ["a"], 1, choose_depth(opened, [1]), sampling=Sampling())
    assert opened.run is not None
    data = opened.run.data.model_copy(update={"kind": "reasoning"})
    asked = replace(opened, run=opened.run.model_copy(update={"data": data}))
    with pytest.raises(MythosError, match=r"of a reasoning run, .*: use `mythos reasoning`"):
        generate_text(asked, ["a"], 1, choose_depth(opened, [1]), sampling=Sampling())
