"""Train the reference model: one command, resumable, from nothing to a folder that transformers loads.

    python -m aquifer.workloads.reference.train --out server/models/reference

The curriculum advances by answer loss, not by time. Copying is learned suddenly, on short documents; a run
that moves to long ones too early stays on a plateau and never leaves it.
"""

import argparse
import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import Parameter
from transformers import LlamaForCausalLM

from aquifer.workloads.reference.card import Card, card_from, export, in_bfloat16, read_card
from aquifer.workloads.reference.data import ANSWER, DOCUMENT, TASKS, Batch, BatchStream, batches, make_sample
from aquifer.workloads.reference.model import TrainingForward, new_model, reference_config
from aquifer.workloads.reference.scores import evaluate
from aquifer.workloads.reference.tokenizer import (
    PieceEncoder,
    load_tokenizer,
    train_tokenizer,
    wrap_tokenizer,
)


@dataclass(frozen=True)
class Stage:
    """A step of the curriculum: a mix of row lengths, and when to leave it."""

    length_shares: dict[int, float]
    until_loss: float
    longest_share: float  # of the planned time; 1.0: as long as the loss asks for
    document_weight: float  # of a document token's loss, against 1 for an answer token

    @property
    def main_length(self) -> int:
        return max(self.length_shares)


# Lengths are 9/8 of a power of two: a prompt of 8,192 tokens and its answer fit in 9,216.
STAGES = (
    Stage({576: 1.0}, 0.3, 0.15, 0.1),
    Stage({1152: 0.9, 576: 0.1}, 0.003, 1.0, 0.1),
    Stage({4608: 0.7, 2304: 0.15, 1152: 0.15}, 0.003, 0.25, 0.05),
    Stage({9216: 0.65, 4608: 0.15, 2304: 0.1, 1152: 0.1}, 0.0015, 0.3, 0.03),
    Stage({18432: 0.2, 9216: 0.4, 4608: 0.3, 2304: 0.05, 1152: 0.05}, 0.0, 1.0, 0.03),
)


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run. `total_seconds` of training set the learning rate's decay."""

    seed: int = 1
    total_seconds: float = 1500.0
    step_tokens: int = 147_456
    peak_rate: float = 2e-3
    decay_share: float = 0.5
    warmup_steps: int = 60
    weight_decay: float = 0.02
    workers: int = 14
    layers: int = 8
    hidden: int = 384
    mlp: int = 1024
    stages: tuple[Stage, ...] = STAGES
    tokenizer_samples: int = 600
    eval_samples: int = 48


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    stage: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stage_began: float = 0.0
    resumed: int = 0


class Trainer:
    """Model, optimizers and progress of one run. `checkpoint`: continue from `save`'s file."""

    def __init__(self, settings: Settings, checkpoint: dict[str, Any] | None, weights: Path | None) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if checkpoint is not None:
            self.tokenizer = wrap_tokenizer(Tokenizer.from_str(checkpoint["tokenizer"]))
        elif weights is not None:
            self.tokenizer = load_tokenizer(weights)
        else:
            self.tokenizer = train_tokenizer(tokenizer_texts(settings.tokenizer_samples))
        self.encoder = PieceEncoder(self.tokenizer)
        config = reference_config(len(self.tokenizer), settings.layers, settings.hidden, settings.mlp)
        with self.device:
            self.model = new_model(config)
        matrices, others = _split_parameters(self.model)
        self.muon = torch.optim.Muon(
            matrices, lr=0.0, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(others, lr=0.0, weight_decay=0.0, betas=(0.9, 0.95))
        self.progress = Progress()
        self.card = Card(seed=settings.seed, parameters=sum(p.numel() for p in self.model.parameters()))
        self.optimizer_steps = 0
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            self.muon.load_state_dict(checkpoint["muon"])
            self.adamw.load_state_dict(checkpoint["adamw"])
            self.progress, self.card = Progress(**checkpoint["progress"]), card_from(checkpoint["card"])
            self.optimizer_steps = checkpoint["optimizer_steps"]
        elif weights is not None:
            self.model.load_state_dict(load_file(weights / "model.safetensors"), strict=False)
            self.card = read_card(weights)
            self.progress = Progress(**self.card.stages[-1]["progress"])
        self.progress.resumed += 1

    def save(self, path: Path) -> None:
        state = {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
            "progress": asdict(self.progress),
            "card": asdict(self.card),
            "optimizer_steps": self.optimizer_steps,
        }
        torch.save(state, path)

    def train(self, deadline: float) -> None:
        """Train until time.monotonic() passes `deadline` or the planned time is used up."""
        compiled = self.device.type == "cuda"
        dtype = torch.bfloat16 if compiled else torch.float32
        forward = TrainingForward(self.model, dtype, compile_parts=compiled)
        while time.monotonic() < deadline and self.progress.seconds < self.settings.total_seconds:
            stage = self.settings.stages[self.progress.stage]
            stream = batches(self._stream(stage), self.settings.workers)
            meter = Meter(stage.main_length)
            self._say(f"stage {self.progress.stage}: lengths {stage.length_shares}")
            began = time.monotonic()
            while True:
                self._step(forward, next(stream), stage, meter)
                now = time.monotonic()
                self.progress.seconds += now - began
                began = now
                if meter.due():
                    self._say(meter.report(self.progress, self._rate()))
                if now >= deadline or self.progress.seconds >= self.settings.total_seconds:
                    return
                if self._leave(stage, meter):
                    break
            del stream  # ends its worker processes before the next stage starts its own
            self.progress.stage += 1
            self.progress.stage_began = self.progress.seconds

    def _step(self, forward: TrainingForward, batch: Batch, stage: Stage, meter: "Meter") -> None:
        ids = batch.ids.to(self.device, torch.int64, non_blocking=True)
        roles = batch.roles.to(self.device, non_blocking=True)
        # A token's loss belongs to the token predicted, so roles move one to the left.
        answer = (roles[:, 1:] == ANSWER).float()
        weights = answer + stage.document_weight * (roles[:, 1:] == DOCUMENT)
        losses = forward(ids)[:, :-1]
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = self._rate()
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.optimizer_steps += 1
        self.progress.step += 1
        self.progress.tokens += ids.numel()
        meter.add(batch, (losses.detach() * answer).sum(1) / answer.sum(1), ids.numel())

    def _rate(self) -> float:
        """Warm up (again after a resume from weights alone), hold, then decay linearly by planned time."""
        warmup = min(1.0, (self.optimizer_steps + 1) / self.settings.warmup_steps)
        left = max(0.0, 1.0 - self.progress.seconds / self.settings.total_seconds)
        return self.settings.peak_rate * min(warmup, max(left / self.settings.decay_share, 0.01), 1.0)

    def _leave(self, stage: Stage, meter: "Meter") -> bool:
        if self.progress.stage + 1 == len(self.settings.stages):
            return False
        spent = (self.progress.seconds - self.progress.stage_began) / self.settings.total_seconds
        return meter.answer_loss < stage.until_loss or spent > stage.longest_share

    def _stream(self, stage: Stage) -> BatchStream:
        p = self.progress
        seed = f"{self.settings.seed}/{p.stage}/{p.resumed}/{p.step}"
        return BatchStream(stage.length_shares, self.settings.step_tokens, self.encoder, seed)

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self.card.log.append(line)

    def finish(self, out: Path, evaluated: bool) -> None:
        """Export the model; with `evaluated`, score the exported (bf16) weights first, in float32."""
        p, card = self.progress, self.card
        card.steps, card.train_tokens, card.train_seconds = p.step, p.tokens, round(p.seconds, 1)
        card.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        card.stages.append({"progress": asdict(p)})
        if evaluated:
            card.scores = []
            shipped = in_bfloat16(self.model).float()
            for score in evaluate(shipped, self.encoder, self.tokenizer, self.settings.eval_samples):
                card.scores.append(score)
                self._say(
                    f"eval {score.task} {score.prompt_tokens}: {score.score:.2f} ({score.samples} samples)"
                )
        export(out, self.model, self.tokenizer, card)


class Meter:
    """Answer loss by task and length since the last report, and its moving average at the main length.

    Losses stay on the GPU and are fetched every few steps, so that no step waits for the one before.
    """

    _FETCH_EVERY = 10
    _SECONDS = 5.0

    def __init__(self, main_length: int) -> None:
        self._main = main_length
        self._pending: list[tuple[Batch, Tensor]] = []
        self._sums: dict[tuple[int, int], list[float]] = defaultdict(list)
        self._tokens, self._began = 0, time.monotonic()
        self._average: float | None = None

    @property
    def answer_loss(self) -> float:
        return math.inf if self._average is None else self._average

    def add(self, batch: Batch, row_losses: Tensor, tokens: int) -> None:
        """row_losses: [B] mean answer loss of each row."""
        self._pending.append((batch, row_losses))
        self._tokens += tokens
        if len(self._pending) >= self._FETCH_EVERY:
            self._fetch()

    def _fetch(self) -> None:
        for batch, row_losses in self._pending:
            length = batch.ids.shape[1]
            values = row_losses.tolist()
            for task, value in zip(batch.tasks.tolist(), values, strict=True):
                self._sums[task, length].append(value)
            if length == self._main:
                mean = sum(values) / len(values)
                # From the worst value down: one lucky batch must not end a stage.
                self._average = mean if self._average is None else 0.95 * self._average + 0.05 * mean
        self._pending.clear()

    def due(self) -> bool:
        return time.monotonic() - self._began >= self._SECONDS

    def report(self, progress: Progress, rate: float) -> str:
        self._fetch()
        speed = self._tokens / (time.monotonic() - self._began)
        parts = [
            f"{TASKS[task]}@{length} {sum(values) / len(values):.4f}"
            for (task, length), values in sorted(self._sums.items(), key=lambda item: item[0][::-1])
        ]
        self._sums.clear()
        self._tokens, self._began = 0, time.monotonic()
        return (
            f"{progress.seconds:6.0f}s stage {progress.stage} step {progress.step} "
            f"{progress.tokens / 1e6:.0f}M "
            f"lr {rate:.1e} {speed / 1e3:.0f}k tok/s | {' '.join(parts)} | mean {self.answer_loss:.4f}"
        )


def tokenizer_texts(samples: int) -> Iterator[str]:
    """Training-split text of every task, in the shares the model sees."""
    for seed in range(samples):
        for task in ("text2json", "text2json", "needles", "table"):
            # No tokenizer exists yet; two characters per token is near enough for a length.
            sample = make_sample(task, seed, 2048, lambda text: len(text) // 2)
            yield sample.document
            for question in sample.questions:
                yield question.inputs
                yield question.answer


def _split_parameters(model: LlamaForCausalLM) -> tuple[list[Parameter], list[Parameter]]:
    """Matrices inside layers (Muon), and the rest: embedding and norms (AdamW)."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return matrices, others


def train_reference(
    out: Path,
    settings: Settings | None = None,
    seconds: float = math.inf,
    resume: Path | None = None,
    checkpoint: Path | None = None,
    evaluate_after: bool = True,
    command: str = "aquifer train-reference",
) -> Card:
    """Train, score and export the reference model to `out`.

    seconds: stop cleanly after that many seconds of wall time, set-up included (scoring comes on top).
    resume: a checkpoint file, or an exported folder (weights alone; the optimizers warm up again).
    checkpoint: where to save the full state at the end.
    Returns the card that was written. Raises FileNotFoundError if `resume` does not exist.
    """
    deadline = time.monotonic() + seconds
    state, weights = None, None
    if resume is not None and resume.is_dir():
        weights = resume
    elif resume is not None:
        state = torch.load(resume, map_location="cpu")
    trainer = Trainer(settings or Settings(), state, weights)
    trainer.card.command = command
    trainer.train(deadline)
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        trainer.save(checkpoint)
    trainer.finish(out, evaluate_after)
    return trainer.card


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m aquifer.workloads.reference.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the exported model")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop this call after so many seconds"
    )
    parser.add_argument(
        "--total-seconds", type=float, default=Settings.total_seconds, help="planned training time"
    )
    parser.add_argument(
        "--decay-share",
        type=float,
        default=Settings.decay_share,
        help="of the planned time, at its end, in which the rate falls to nothing",
    )
    parser.add_argument("--resume", type=Path, help="checkpoint file or exported folder")
    parser.add_argument("--checkpoint", type=Path, help="where to save the full state")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--workers", type=int, default=Settings.workers, help="processes that generate data")
    parser.add_argument(
        "--eval-samples", type=int, default=Settings.eval_samples, help="per task and length; 0: none"
    )
    a = parser.parse_args(arguments)
    settings = Settings(
        seed=a.seed,
        total_seconds=a.total_seconds,
        decay_share=a.decay_share,
        workers=a.workers,
        eval_samples=max(a.eval_samples, 1),
    )
    command = shlex.join(["python", "-m", "aquifer.workloads.reference.train", *(arguments or sys.argv[1:])])
    train_reference(a.out, settings, a.seconds, a.resume, a.checkpoint, a.eval_samples > 0, command)


if __name__ == "__main__":
    main()
