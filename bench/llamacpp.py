"""llama.cpp's own side of `bench.gguf`: runs in an environment with llama-cpp-python and numpy, without llmshrink.

    python llamacpp.py quantize IN.gguf OUT.gguf TYPE [IMATRIX.npz]    prints its seconds
    python llamacpp.py logits MODEL.gguf ROWS.npy OUT.npy              float16 [rows, length, vocabulary]

TYPE is a name of `llama_ftype`; IMATRIX holds the mean square of each input by the name of the tensor.
"""

import ctypes
import sys
import time

import llama_cpp
import numpy as np


def quantize(source: str, out: str, kind: str, imatrix: str | None = None) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    arrays = {} if imatrix is None else dict(np.load(imatrix))
    if arrays:
        entries = [
            llama_cpp.llama_model_imatrix_data(name.encode(), x.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), x.size)
            for name, x in arrays.items()
        ]
        entries.append(llama_cpp.llama_model_imatrix_data(None, None, 0))
        params.imatrix = (llama_cpp.llama_model_imatrix_data * len(entries))(*entries)
    start = time.perf_counter()
    failed = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    seconds = time.perf_counter() - start
    if failed:
        sys.exit(f"llama_model_quantize: {failed}")
    print(seconds)


def logits(model: str, rows: str, out: str) -> None:
    tokens = np.load(rows)
    # As exact as it can be: nothing of the attention in float16.
    f32 = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(
        model, n_ctx=tokens.shape[1], n_batch=tokens.shape[1], logits_all=True, type_k=f32, type_v=f32, verbose=False
    )
    found = np.empty((*tokens.shape, llama.n_vocab()), np.float16)
    for number, row in enumerate(tokens.tolist()):
        llama.reset()
        llama.eval(row)
        found[number] = llama.scores[: len(row)]
    np.save(out, found)


if __name__ == "__main__":
    {"quantize": quantize, "logits": logits}[sys.argv[1]](*sys.argv[2:])
