# SPDX-License-Identifier: Apache-2.0
"""Text and JSONL that a tokenizer makes into tokens, through whole jobs."""
import json
import subprocess

from harness import BIN, ROOT, bits, check, config, main, run, same_bits

STEPS = 4


def tokenized(directory):
    """JSONL and text by a tokenizer: the same bits for any number of members; the result writes text with it."""
    paragraphs = (ROOT / "LICENSE").read_text().split("\n\n")
    (directory / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": p[:20], "completion": p[20:]} if i % 2 else {"text": p}) + "\n"
        for i, p in enumerate(paragraphs)))
    model = {"model_type": "llama", "vocab_size": 448, "max_position_embeddings": 64, "hidden_size": 64,
             "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokenizer = ROOT / "tests/peers/tokenizers/llama3.json"
    data = {"train": [{"path": "pairs.jsonl"}, {"path": "text.txt", "format": "text"}], "format": "jsonl",
            "tokenizer": str(tokenizer), "end_token": "<|end_of_text|>", "sequence_length": 48, "validation_fraction": 0.2}
    path = config(directory, model=model, data=data)
    run(path, "--run-dir", directory / "one", "--shards", "1", "--workers", "1")
    run(path, "--run-dir", directory / "more", "--shards", "3", "--workers", "2")
    same_bits("3 shards and 2 workers", bits(directory / "more", STEPS), bits(directory / "one", STEPS))
    check((directory / "one/model/tokenizer.json").read_bytes() == tokenizer.read_bytes(), "tokenizer.json is not the model's")
    prompt = "Lic\u00e9nse <|late|>"
    written = [subprocess.run([BIN / "meshctl", "generate", "--model", directory / "one/model", "--prompt", prompt,
                               "--tokens", "9", "--seed", "1"], check=True, capture_output=True).stdout for _ in range(2)]
    begin = f"<|begin_of_text|>{prompt}".encode()
    check(written[0] == written[1] and written[0].startswith(begin) and len(written[0]) > len(begin) + 9, written)


if __name__ == "__main__":
    main([tokenized])
