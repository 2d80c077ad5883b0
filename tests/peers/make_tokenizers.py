# SPDX-License-Identifier: Apache-2.0
"""Makes tokenizers as GPT-2, Llama 3, Qwen 2 and SmolLM have them, and what Hugging Face's tokenizers does with texts.

Each is trained here on text made up of many scripts, emoji, numbers, runs of blanks, contractions and code; NAME.json is
the tokenizer.json, NAME.cases.json a list of {"text", "ids"}: special tokens in the text count, the template is left out.
With few lines the vocabularies are small too, so that they can be committed.

usage: make_tokenizers.py OUT_DIRECTORY [LINES]
"""
import json
import pathlib
import random
import sys
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SCRIPTS = [(0x61, 0x7A), (0x41, 0x5A), (0xC0, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x531, 0x587), (0x5D0, 0x5EA),
           (0x620, 0x64A), (0x905, 0x939), (0x985, 0x9B9), (0xE01, 0xE3A), (0x10D0, 0x10FF), (0x1100, 0x1175),
           (0x1E00, 0x1EFF), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x4FFF), (0xAC00, 0xAFFF), (0x10330, 0x1034A),
           (0x20000, 0x20040)]
MARKS = [0x300, 0x301, 0x308, 0x323, 0x327, 0x5B4, 0x64B, 0x93C, 0x93F, 0x11A8, 0x3099]
BLANKS = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u2003", "\u3000", "\u2028", "\x0b", "\x85",
          "\u180e", "\u200b", "\ufeff", "        "]
WORDS = ["don't", "I'll", "WE'VE", "it's", "he'd", "They'Re", "rock'n'roll", "'tis", "o'clock", "l'été", "'\u017f", "''", "can\u2019t",
         "def f(x):", "return x[0] += 1;", "</p>", "https://example.org/a?b=c&d=%20", "user@example.org", "C++", "#include <stdio.h>",
         "\u00bd", "x\u00b2", "\u2167", "\u0663\u0664\u0665", "\u0967\u0968", "3.14159", "1,000,000", "0x7fff", "1234567890", "12", "v2",
         "the", " the", "training", "language model", "\u1e9b\u0323", "A\u030a", "e\u0301", "\ufb01ne", "\u2126", "\u212b"]
EMOJI = ["\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001f44d\U0001f3fd",
         "1\ufe0f\u20e3"]
PUNCTUATION = list("!?.,;:()[]{}<>/\\|@#$%^&*-_=+~`\"'") + ["...", "—", "«»", "。", "、", "¿", "!!!", "\x00", "\x1b", "\x7f", "\u0301"]


def assigned(low, high):
    """Letters that every version of Unicode in use has."""
    old = unicodedata.ucd_3_2_0
    return [chr(c) for c in range(low, high + 1) if old.category(chr(c)) != "Cn"]


ALPHABETS = [a for a in (assigned(*s) for s in SCRIPTS) if a]


def word(rng):
    kind = rng.random()
    if kind < 0.5:
        letters = rng.choices(rng.choice(ALPHABETS[:2] if rng.random() < 0.4 else ALPHABETS), k=rng.randint(1, 9))
        if rng.random() < 0.15:
            letters.insert(rng.randint(1, len(letters)), chr(rng.choice(MARKS)))
        return "".join(letters)
    if kind < 0.7:
        return rng.choice(WORDS)
    if kind < 0.8:
        return "".join(rng.choices("0123456789", k=rng.randint(1, 8)))
    return rng.choice(EMOJI) if kind < 0.85 else "".join(rng.choices(PUNCTUATION, k=rng.randint(1, 4)))


def line(rng, special):
    parts = []
    for _ in range(rng.randint(0, 14)):
        parts.append(word(rng))
        blank = rng.random()
        if blank < 0.6:
            parts.append(" ")
        elif blank < 0.85:
            parts.append("".join(rng.choices(BLANKS, k=rng.randint(1, 3))))
        if special and rng.random() < 0.06:
            parts.append(rng.choice(special))
    return "".join(parts)


def trained(rng, vocabulary, normalizer, steps, special, plain, ignore_merges=False):
    t = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        t.normalizer = normalizer
    t.pre_tokenizer = steps
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    text = [line(rng, []) for _ in range(4000)] + pathlib.Path(__file__).read_text().split("\n") * 3
    t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False,
                                                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.add_special_tokens([AddedToken("<|late|>", special=True, normalized=False)])
    t.add_tokens([AddedToken(p, special=False, normalized=True) for p in plain])
    return t


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated", invert=False),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def make(name, rng, vocabulary):
    if name == "gpt2":
        return trained(rng, vocabulary, None, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"], [])
    if name == "prefix":
        return trained(rng, vocabulary, None, pre_tokenizers.ByteLevel(add_prefix_space=True), ["<s>", "</s>"], ["</p>", "</"])
    if name == "llama3":
        t = trained(rng, vocabulary, None, split(LLAMA3), ["<|begin_of_text|>", "<|end_of_text|>"], [], ignore_merges=True)
        template = processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[
            ("<|begin_of_text|>", t.token_to_id("<|begin_of_text|>"))])
        t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        return t
    if name == "qwen2":
        return trained(rng, vocabulary, normalizers.NFC(), split(QWEN2), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                       ["<tool>", "e\u0301"])
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                      pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return trained(rng, vocabulary, None, digits, ["<|endoftext|>", "<|im_start|>"], [])


def main():
    out, lines = pathlib.Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4000
    out.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(["gpt2", "prefix", "llama3", "qwen2", "smollm"]):
        rng = random.Random(i + 1)
        t = make(name, rng, 2000 if lines >= 1000 else 420)
        (out / f"{name}.json").write_text(t.to_str(pretty=False))
        special = [a.content for a in t.get_added_tokens_decoder().values()]
        texts = [line(rng, special) for _ in range(lines)]
        n = min(lines, 1000)
        texts += ["", " ", "\n", "a" * 3 * n, " " * n + "x", "ab" * n, "'" * 50, "\u0301" * 20, "<|late|><|late|>", "<|late", *special]
        # As a text of many lines: words go on over line ends.
        texts.append("\n".join(texts[:200]))
        cases = [{"text": s, "ids": t.encode(s, add_special_tokens=False).ids} for s in texts]
        with open(out / f"{name}.cases.json", "w") as f:
            f.write("[\n" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n]\n")
        print(f"{name}: {t.get_vocab_size()} tokens, {len(cases)} texts, {sum(len(c['ids']) for c in cases)} ids")


main()
