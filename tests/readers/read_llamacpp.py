"""What llama.cpp makes of GGUF files: runs in an environment of its own, without llmshrink.

    python read_llamacpp.py WORK

WORK/requests.json is a list of {"file": path, "texts": texts, "prompts": rows of ids, "new": count}. Of number i of
them comes WORK/<i>.json: "error": what stopped it, or null; "tokens": the ids of each text; "generated": the ids that
followed each prompt, the most probable ones; "logprobs": of each of these, for every id of the vocabulary, in order.
"""

import json
import sys
import traceback
import urllib.request
from pathlib import Path

import xllamacpp


def main(work: Path) -> None:
    for number, request in enumerate(json.loads((work / "requests.json").read_text())):
        try:
            found = {"error": None, **read(**request)}
        except Exception:  # the other files are read all the same
            found = {"error": traceback.format_exc()}
        (work / f"{number}.json").write_text(json.dumps(found))


def read(file: str, texts: list, prompts: list, new: int) -> dict:
    server = xllamacpp.Server(parameters(file))

    def ask(path: str, **body: object) -> dict:
        url, data = server.listening_address + path, json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as reply:
            return json.loads(reply.read())

    tokens = [ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in texts]
    settings = {"temperature": 0, "n_predict": new, "n_probs": 1_000_000, "return_tokens": True, "cache_prompt": False}
    replies = [ask("/completion", prompt=prompt, **settings) for prompt in prompts]
    return {
        "tokens": tokens,
        "generated": [reply["tokens"] for reply in replies],
        "logprobs": [[in_order(step) for step in reply["completion_probabilities"]] for reply in replies],
    }


def in_order(step: dict) -> list:
    return [top["logprob"] for top in sorted(step["top_logprobs"], key=lambda top: top["id"])]


def parameters(file: str) -> xllamacpp.CommonParams:
    found = xllamacpp.CommonParams()
    found.model.path = file
    found.n_ctx = 128
    found.n_parallel = found.cpuparams.n_threads = 1
    found.n_gpu_layers = found.port = 0
    found.warmup = found.fit_params = False
    found.verbosity = 0
    # As exact as it can be: nothing of the attention in float16.
    found.cache_type_k = found.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    found.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
