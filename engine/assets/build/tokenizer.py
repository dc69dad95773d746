"""Write the closed-vocabulary CLIP tokenizer: real BPE merges that make every word one token."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import glyphs
from transformers import CLIPTokenizer

from synthkd.engine.new_prior import word_merges

LENGTH = 28
START, END = "<|startoftext|>", "<|endoftext|>"


def write(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer's files, load it back and check that ids round-trip."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tuple(dict.fromkeys(glyphs.WORDS))
    ranks = word_merges(words)
    letters = sorted({c for word in words for c in word})
    pieces = [START, END, ",", ",</w>", *letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in ranks)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in ranks)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH).save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    check(tokenizer, vocab, words)
    return tokenizer


def check(tokenizer: CLIPTokenizer, vocab: dict[str, int], words: tuple[str, ...]) -> None:
    """Assert that each word is one token, that text round-trips and that the framing is right."""
    assert tokenizer.model_max_length == LENGTH
    first, last = vocab[START], vocab[END]
    for word in words:
        assert tokenizer(word).input_ids == [first, vocab[f"{word}</w>"], last], word
    text = "the digit three, bold, slanted, red on dark blue, stripes background"
    ids = tokenizer(text).input_ids
    assert ids == [first, *(vocab[f"{w}</w>"] for w in text.replace(",", " ,").split()), last]
    assert tokenizer.decode(ids[1:-1]).replace(" ,", ",").strip() == text


def word_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> list[list[int]]:
    """Tokenize captions of the closed word list by direct lookup, padded to the model's length."""
    vocab = tokenizer.get_vocab()
    first, last = vocab[START], vocab[END]
    rows = [[first, *(vocab[f"{w}</w>"] for w in text.replace(",", " ,").split()), last] for text in captions]
    return [row + [tokenizer.pad_token_id] * (LENGTH - len(row)) for row in rows]


def main() -> None:
    """Write the tokenizer from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=glyphs.SCRATCH / "tokenizer", help="where to write it")
    tokenizer = write(parser.parse_args().folder)
    sample = ["the digit three, bold, light on dark", ""]
    padded = tokenizer(sample, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    assert word_ids(tokenizer, sample) == padded
    print(f"vocabulary {len(tokenizer)}, {len(set(glyphs.WORDS))} words")


if __name__ == "__main__":
    main()
