"""Decoding T5-small on the CPU: tokens per second against Hugging Face and CTranslate2, same weights, same tokens.

    python bench/decode.py [--batches 1 8 32] [--repeats 5] [--quick] [--json FILE]

Random weights, 64 source tokens, 64 new ones, float32, 2 threads; greedy, and beam search of 4 at the second batch
size. Every peer is alone in a process, and writes our tokens before anything is timed; CTranslate2 in int8 and with
beams, where near-ties of random weights part the searches, is excused, and its share of our tokens is shown.
"of bound" is the share of what the memory allows: the bytes of the decoder's matrices, its head and its caches that a
pass reads, over the bandwidth that summing an array of 1 GB reaches here. Then, by compilation alone: temporary memory
of beam search with mT5's 250,112 tokens, against a table of all continuations, and one of these at every position.
--quick: a tiny model; its numbers say nothing.
"""

import argparse
import tempfile
import time
from functools import partial

from timing import Peer, environment, huge_pages, measure, pin_threads, report

SOURCE, NEW, BEAMS = 64, 64, 4
EXACT = ("ours", "Hugging Face", "CTranslate2")
TARGETS = {  # (peer, batch size, beams) -> times its tokens per second
    ("Hugging Face", 1, 1): 2.5,
    ("Hugging Face", 8, 1): 1.5,
    ("CTranslate2", 1, 1): 1.2,
    ("CTranslate2", 8, 1): 1.0,
    ("CTranslate2", 32, 1): 1.0,
}


def made(name):
    """(model, parameters as NumPy), the same in every process."""
    import jax

    from mlm.models.presets import preset
    from mlm.models.transformer import Transformer

    model = Transformer(preset(name))
    return model, jax.device_get(jax.jit(model.init)(jax.random.key(0)))


def sources(batch, vocabulary):
    import numpy as np

    return np.random.default_rng(0).integers(3, vocabulary, (batch, SOURCE))


# What a peer's process makes: a call (batch size, beams) -> tokens [batch, NEW].


def ours(name):
    pin_threads(2)
    import jax

    from mlm.decoding.config import DecodeConfig
    from mlm.decoding.generate import Generator

    model, params = made(name)
    params = jax.device_put(params)
    options = {"max_length": NEW, "min_length": NEW}
    generators = {
        1: Generator(model, DecodeConfig(**options)),
        BEAMS: Generator(model, DecodeConfig(method="beam", beams=BEAMS, alpha=0.0, **options)),
    }
    return lambda batch, beams: generators[beams](params, sources(batch, model.config.vocab_size)).tokens[:, 0], None


def torch_peer(name):
    threads = pin_threads(2)
    import hugging_face
    import torch

    model, params = made(name)
    theirs = hugging_face.t5(model.config, params, "sdpa", threads).eval()
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True}

    def call(batch, beams):
        ids = torch.from_numpy(sources(batch, model.config.vocab_size))
        with torch.no_grad():
            found = theirs.generate(ids, attention_mask=torch.ones_like(ids), num_beams=beams, **options)
        return found[:, 1:].numpy()

    return call, None


def ctranslate2_peer(name, kind):
    threads = pin_threads(2)
    import ctranslate2
    import hugging_face
    import numpy as np
    from ctranslate2.converters.transformers import T5Loader

    model, params = made(name)
    loader = T5Loader()
    spec = loader.get_model_spec(hugging_face.t5(model.config, params, "eager", threads))
    words = ["<pad>", "</s>", "<unk>", *(str(i) for i in range(3, model.config.vocab_size))]
    loader.set_vocabulary(spec, words)
    for role, word in {"bos": "<pad>", "eos": "</s>", "unk": "<unk>"}.items():
        setattr(spec.config, f"{role}_token", word)
    spec.config.decoder_start_token = "<pad>"
    spec.validate()
    spec.optimize(quantization=kind)
    number = {word: i for i, word in enumerate(words)}
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        translator = ctranslate2.Translator(folder, "cpu", intra_threads=threads, compute_type=kind)

    def call(batch, beams):
        texts = [[words[i] for i in row] for row in sources(batch, len(words))]
        found = translator.translate_batch(
            texts, beam_size=beams, max_decoding_length=NEW, min_decoding_length=NEW, length_penalty=0
        )
        return np.array([[number[word] for word in result.hypotheses[0]] for result in found])

    return call, None


def bandwidth(repeats=5):
    """Bytes per second of reading an array."""
    pin_threads(2)
    import jax
    import jax.numpy as jnp

    array, total = jnp.ones((256, 1 << 20)), jax.jit(jnp.sum)
    total(array).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        total(array).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return (lambda: None), array.nbytes / min(seconds)


def bytes_of_a_pass(name, batch, beams):
    """Read at the least: matrices of the decoder, the head, and on average half of the full caches."""
    from mlm.models.presets import preset
    from mlm.models.transformer import Transformer
    from mlm.trees import named_leaves

    config = preset(name)
    read = sum(
        leaf.size * 4
        for path, leaf in named_leaves(Transformer(config).shapes())
        if path == ("embedding" if config.head.kind == "tied" else "head")
        # Keys and values of the source are made once.
        or (path.startswith("decoder/") and not path.endswith(("cross_attention/key", "cross_attention/value")))
    )
    own = config.decoder.attentions()[0]
    row = 2 * 4 * config.decoder.layers * own.key_heads * own.head_dim
    return read + row * batch * (SOURCE + beams * NEW / 2)


def memory(rows=8, length=128):
    """Temporary bytes of beam search over a large vocabulary, by the number of beams; nothing is run."""
    import jax
    import jax.numpy as jnp

    from mlm.decoding.config import DecodeConfig
    from mlm.decoding.generate import Generator
    from mlm.models.presets import preset
    from mlm.models.transformer import Transformer

    model = Transformer(preset("mt5_small"))
    of_rows = jax.ShapeDtypeStruct((rows,), jnp.int32)
    inputs = {
        "sources": jax.ShapeDtypeStruct((rows, SOURCE), jnp.int32),
        **dict.fromkeys(("source_lengths", "limits", "ids"), of_rows),
    }
    found = []
    for beams in (1, 2, 4, 8):
        generator = Generator(model, DecodeConfig(method="beam", beams=beams, max_length=length))
        compiled = generator._run.lower((model.shapes(),), inputs, None, None, None).compile()
        table = rows * beams * model.config.vocab_size * 4 / 1e6
        found.append(
            {
                "beams": str(beams),
                "temporary MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
                "beams x vocabulary, MB": table,
                "x length, MB": table * length,
            }
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    name = "tiny" if options.quick else "t5_small"
    peers = {
        "ours": Peer(ours, name),
        "Hugging Face": Peer(torch_peer, name),
        "CTranslate2": Peer(ctranslate2_peer, name, "float32"),
        "CTranslate2, int8": Peer(ctranslate2_peer, name, "int8"),
    }
    bytes_per_second = Peer(bandwidth).facts
    rows, rates = [], {}
    for batch, beams in [(b, 1) for b in options.batches] + [
        (options.batches[min(1, len(options.batches) - 1)], BEAMS)
    ]:
        found = {peer: call(batch, beams) for peer, call in peers.items()}
        same = {peer: float((tokens == found["ours"]).mean()) for peer, tokens in found.items()}
        for peer in EXACT:
            if same[peer] < 1.0 and not (beams > 1 and peer == "CTranslate2"):
                raise ValueError(
                    f"{peer} writes other tokens at batch {batch}, beams {beams}: {same[peer]:.3f} are ours"
                )
        times = measure({peer: partial(call, batch, beams) for peer, call in peers.items()}, options.repeats)
        bound = bytes_per_second / bytes_of_a_pass(name, batch, beams) * batch
        for peer, time_ in times.items():
            rate = rates[peer, batch, beams] = batch * NEW / time_["seconds"]
            rows.append(
                {
                    "peer": f"batch {batch}, {'greedy' if beams == 1 else f'beam {beams}'}: {peer}",
                    "tokens/s": rate,
                    "ours is x": rates["ours", batch, beams] / rate,
                    "of bound": rate / bound,
                    "our tokens": same[peer],
                }
            )
    setting = {"model": name, "bandwidth, GB/s": f"{bytes_per_second / 1e9:.1f}"}
    report("Decoding", {**setting, **environment("jax", "torch", "transformers", "ctranslate2")}, rows, options.json)
    for (peer, batch, beams), least in TARGETS.items():
        if (peer, batch, beams) in rates and not options.quick:
            value = rates["ours", batch, beams] / rates[peer, batch, beams]
            print(f"x {peer}, batch {batch}: {value:.2f}, target >= {least}: {'met' if value >= least else 'MISSED'}")
    path = options.json and f"{options.json}.memory"
    report("\nBeam search of mt5_small, 8 sources, 128 tokens", environment("jax"), memory(), path)


if __name__ == "__main__":
    huge_pages()
    main()
