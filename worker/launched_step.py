"""LaunchedStep: what the runners make of a step whose logits are enqueued: its tokens chosen, kept and brought home."""

import torch
from torch import Tensor

from worker.last_tokens import LastTokens
from worker.prompt_logprobs import ShareScores
from worker.sampler import Choices, Sampler, is_plain_greedy, needs_known_tokens
from worker.sequence import Sample, ScheduledSequence
from worker.transfer import Download, upload

Entry = tuple[int, ScheduledSequence]  # the sample's place among the step's samples, and whose it is


class LaunchedStep:
    """Samples of one step; see worker.step_pipeline.LaunchedStep.

    Rows whose choice depends on tokens that the host does not know yet are sampled late: the host learns them while
    the step's forward pass runs.
    """

    def __init__(
        self,
        sampler: Sampler,
        last_tokens: LastTokens,
        sampled: list[ScheduledSequence],
        rows: list[int],
        logits: Tensor,
        greedy: Tensor | None = None,
        scores: list[ShareScores] | None = None,
    ) -> None:
        """sampled[i] takes its token from logits[rows[i]]. logits may be changed. scores: of prompts in this step.

        greedy: int64 [num_rows], each row's best as kernels.reference.argmax has it, where that is found already; it
        is what plain greedy rows get, and is changed for the others.
        """
        self._sampler, self._last_tokens = sampler, last_tokens
        self._rows = rows
        self._logits = logits
        self._tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device) if greedy is None else greedy
        self._with_logprobs: list[tuple[list[Entry], Tensor, Tensor]] = []
        self._scores = scores or []
        self._download: Download | None = None
        last_tokens.set_rows({s.sequence.sequence_id: row for s, row in zip(sampled, rows, strict=True)})
        to_choose = [(i, s) for i, s in enumerate(sampled) if greedy is None or not is_plain_greedy(s)]
        self._late = [entry for entry in to_choose if _is_late(entry[1])]
        self._choose([entry for entry in to_choose if not _is_late(entry[1])])
        if not self._late:
            self._bring_home()

    @torch.inference_mode()
    def sample_late(self) -> None:
        """Enqueues the sampling of the rows that wait for the tokens of the step before."""
        if self._late:
            late, self._late = self._late, []
            self._choose(late)
            self._bring_home()

    def collect(self) -> list[Sample]:
        """One Sample for each of `sampled`; scores go to their sequences. Waits for the step."""
        assert self._download is not None, "sample_late comes first"
        tokens, *logprobs = self._download.wait()
        for scores in reversed(self._scores):
            *logprobs, values, ids = logprobs
            scores.take(values, ids)
        chosen: list[int] = tokens.tolist()
        samples = [Sample(token, failed=token < 0) for token in map(chosen.__getitem__, self._rows)]
        for (entries, _, _), of_entries, likeliest in zip(
            self._with_logprobs, logprobs[::2], logprobs[1::2], strict=True
        ):
            for (i, scheduled), values, ids in zip(entries, of_entries.tolist(), likeliest.tolist(), strict=True):
                if not samples[i].failed:
                    num_top = scheduled.sequence.sampling.logprobs or 0
                    top = tuple(zip(ids[:num_top], values[1 : num_top + 1], strict=True))
                    samples[i] = Sample(samples[i].token_id, values[0], top)
        return samples

    def _choose(self, entries: list[Entry]) -> None:
        if not entries:
            return
        rows, batch = [self._rows[i] for i, _ in entries], [scheduled for _, scheduled in entries]
        if rows == list(range(len(self._logits))):
            choices = self._sampler.choose(self._logits.float(), batch)
            self._tokens.copy_(choices.tokens)
        else:
            places = upload(torch.tensor(rows), self._logits.device)
            choices = self._sampler.choose(self._logits.index_select(0, places).float(), batch)
            self._tokens.index_copy_(0, places, choices.tokens)
        self._last_tokens.keep(self._tokens)
        self._note_logprobs(entries, choices)

    def _note_logprobs(self, entries: list[Entry], choices: Choices) -> None:
        if choices.logprobs is not None and choices.likeliest is not None:
            wanting = [entries[row] for row in choices.wanting]
            self._with_logprobs.append((wanting, choices.logprobs, choices.likeliest))

    def _bring_home(self) -> None:
        logprobs = [tensor for _, values, ids in self._with_logprobs for tensor in (values, ids)]
        scores = [tensor for scores in self._scores for tensor in scores.tensors]
        self._download = Download([self._tokens, *logprobs, *scores])


def _is_late(scheduled: ScheduledSequence) -> bool:
    return needs_known_tokens(scheduled.sequence.sampling) and scheduled.end > len(scheduled.sequence.token_ids)
