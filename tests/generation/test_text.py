"""Pieces of text, numbers of a generation, and errors of a model that cannot continue text."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from mythos.checkpoints.stored_model import OpenedModel, open_model
from mythos.data.tokenizer import Tokenizer
from mythos.errors import MythosError
from mythos.generation import text
from mythos.generation.sampling import Sampling
from mythos.generation.text import Piece, PieceStream, TextGeneration, TextRow, choose_depth, generate_text
from mythos.model.halting import Act, Convergence, SecondDifference
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.trainer import Trainer
from tests.trainers import copy_of


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


def test_a_model_without_text_is_refused(trained: Trainer, tmp_path: Path) -> None:
    copy_of(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    opened = open_model(tmp_path / "run")
    assert opened.tokenizer is None
    with pytest.raises(MythosError, match="there is no tokenizer beside it"):
        generate_text(opened, ["a"], 1, choose_depth(opened, [1]), sampling=Sampling())
    assert opened.run is not None
    data = opened.run.data.model_copy(update={"kind": "reasoning"})
    asked = replace(opened, run=opened.run.model_copy(update={"data": data}))
    with pytest.raises(MythosError, match=r"of a reasoning run, .*: use `mythos reasoning`"):
        generate_text(asked, ["a"], 1, choose_depth(opened, [1]), sampling=Sampling())
