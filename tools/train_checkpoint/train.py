"""Train a small Llama, and its tokenizer, on documentation from Debian packages: how the shipped checkpoints were made.

    python tools/train_checkpoint/train.py --out /tmp/manual-5m --minutes 62 --threads 2
    python tools/train_checkpoint/train.py --out /tmp/draft --tokenizer /tmp/manual-5m --hidden 128 --mlp 352 --layers 2
    python tools/train_checkpoint/train.py --out /tmp/smoke --smoke        about a minute: does it all work?

Writes a checkpoint in the Hugging Face layout: config.json, model.safetensors (bfloat16), tokenizer.json.
Needs torch, transformers and tokenizers; the packages come through apt-get download, manual pages need `man`.
"""

import argparse
import json
import random
import time
from pathlib import Path

import corpus
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

VOCABULARY = 4096
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]  # ids 0 to 4; the chat marks stay untrained
BOS, EOS, PAD = 0, 1, 2
CONTEXT = 2048
WINDOW, BATCH = 512, 8  # tokens a sample, samples a step
MUON_RATE, ADAM_RATE = 0.02, 3e-3
WARM_UP = 50  # steps
FALL_FROM = 0.55  # of the time: from here the learning rate falls to FLOOR of itself
FLOOR = 0.02
HELD_OUT = 50  # one document in so many is for validation
REPORT = 30  # seconds between two lines of progress


def main() -> None:
    wish = arguments()
    torch.set_num_threads(wish.threads)
    torch.manual_seed(wish.seed)
    corpus.download(wish.packages, wish.work)
    texts = corpus.documents(wish.work, wish.packages)
    random.Random(wish.seed).shuffle(texts)
    print(f"{len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} M characters", flush=True)

    wish.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(wish.tokenizer / "tokenizer.json")) if wish.tokenizer else make_tokenizer(texts)
    held_out = max(1, len(texts) // HELD_OUT)
    held, learnt = encode(tokenizer, texts[:held_out]), encode(tokenizer, texts[held_out:])
    print(f"{len(learnt)} tokens to learn, {len(held)} held out", flush=True)

    model = LlamaForCausalLM(config(wish))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    train(model, learnt, held, wish)
    save(model, tokenizer, wish.out)
    prompt = torch.tensor([[BOS, *tokenizer.encode("The following example", add_special_tokens=False).ids]])
    answer = model.float().generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=PAD)
    print(repr(tokenizer.decode(answer[0].tolist())))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint to write")
    parser.add_argument("--work", type=Path, default=Path("build/corpus"), help="packages are kept here (build/corpus)")
    parser.add_argument("--packages", nargs="+", default=list(corpus.PACKAGES), help="Debian packages to read")
    parser.add_argument("--tokenizer", type=Path, help="checkpoint whose tokenizer is used, instead of a new one")
    parser.add_argument("--minutes", type=float, default=62.0, help="of training (62)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256, help="width; the 4 heads share it (256)")
    parser.add_argument("--mlp", type=int, help="width of the MLP (three times --hidden)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 where autocast does")
    parser.add_argument("--smoke", action="store_true", help="a minute on one small package: does it all work?")
    wish = parser.parse_args()
    if wish.smoke:
        wish.packages, wish.minutes, wish.hidden, wish.layers = ["debian-policy"], 0.5, 64, 2
    return wish


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, which can write any text; it puts BOS before a prompt, as before every document in training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A",
        pair=f"{SPECIAL[BOS]} $A {SPECIAL[BOS]}:1 $B:1",
        special_tokens=[(SPECIAL[BOS], BOS)],
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, each between BOS and EOS."""
    batch = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return torch.tensor([token for text in batch for token in (BOS, *text.ids, EOS)])


def config(wish: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=wish.hidden,
        intermediate_size=wish.mlp or 3 * wish.hidden,
        num_hidden_layers=wish.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=wish.hidden // 4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def train(model: LlamaForCausalLM, learnt: torch.Tensor, held: torch.Tensor, wish: argparse.Namespace) -> None:
    """Muon (https://kellerjordan.github.io/posts/muon) for matrices, AdamW for the rest, until the time is up."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        (torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="original"), MUON_RATE),
        (torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0), ADAM_RATE),
    ]
    generator = torch.Generator().manual_seed(wish.seed + 1)
    probes = [sample(held, generator) for _ in range(8)]
    begin, step, reported = time.monotonic(), 0, 0.0
    while (elapsed := time.monotonic() - begin) < 60 * wish.minutes:
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, elapsed / (60 * wish.minutes))
        value = loss(model, sample(learnt, generator), wish.bfloat16)
        model.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        step += 1
        if elapsed >= reported:
            reported = elapsed + REPORT
            print(f"{elapsed:6.0f} s  step {step}  {step * WINDOW * BATCH} tokens  loss {value.item():.3f}", flush=True)
    with torch.no_grad():
        final = sum(loss(model, probe, wish.bfloat16).item() for probe in probes) / len(probes)
    print(f"{step} steps, {step * WINDOW * BATCH} tokens, held-out loss {final:.3f} nats a token", flush=True)


def schedule(step: int, done: float) -> float:
    """What the learning rate is multiplied by: up during WARM_UP, flat, then down to FLOOR."""
    return min(1.0, (step + 1) / WARM_UP) * (1.0 if done < FALL_FROM else max(FLOOR, (1 - done) / (1 - FALL_FROM)))


def sample(tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[BATCH WINDOW+1] windows from anywhere in the text."""
    starts = torch.randint(len(tokens) - WINDOW - 1, (BATCH, 1), generator=generator)
    return tokens[starts + torch.arange(WINDOW + 1)]


def loss(model: LlamaForCausalLM, batch: torch.Tensor, bfloat16: bool) -> torch.Tensor:
    """Cross-entropy of each next token, in nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    model.eval().generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=True, temperature=0.7, top_p=0.95
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    kind = {"tokenizer_class": "TokenizersBackend", "model_max_length": CONTEXT, "add_bos_token": True}
    marks = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=False))
    (out / "tokenizer_config.json").write_text(json.dumps(kind | marks, indent=2) + "\n")


if __name__ == "__main__":
    main()
