"""One accelerate() call: what to try, what to keep, what to say about it."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from pyseg._accelerate.chains import Found, find_convolutions
from pyseg._accelerate.detection import find_parts, time_parts
from pyseg._accelerate.layout import ChannelsLast
from pyseg._accelerate.measure import Example, Outputs, difference, interleaved_ms
from pyseg._accelerate.modules import Chain, FusedAtrousConv2d, Swaps
from pyseg._accelerate.report import Report, Row
from pyseg._accelerate.trial import Form, Stopwatch, Trial, forms_of
from pyseg.nn.atrous_conv2d import why_torch_runs

# Of outputs that went through a whole network, relative to their largest magnitude.
_TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TOLERANCE = 1e-4
# Some networks amplify rounding errors. Ours may be this many times the original's own: Winograd's are 4 times those of
# the direct method at the most, and maxima of few outputs scatter.
_ROUNDING_MARGIN = 10


class _OutputsDiffer(RuntimeError):
    """Of the accelerated model, by more than is allowed."""

    def __init__(self, text: str, allowed: float) -> None:
        super().__init__(text)
        self.allowed = allowed


class Session:
    """One accelerate() call."""

    def __init__(self, model: nn.Module, exact: bool, say: Callable[[str], None]) -> None:
        self._model = model
        self._found = find_convolutions(model)
        self._exact = exact
        self._say = say
        self._swaps = Swaps()
        self._layout = ChannelsLast(model)
        self._parts = find_parts(model)
        self._used = [part for part in self._parts if not part.rejected]  # those that are to be changed
        self.chains = [each.chain for each in self._found if each.chain is not None]

    def apply(self, choice: dict[Chain, Form], channels_last: bool) -> None:
        self._layout.set(channels_last)
        for chain, form in choice.items():
            if form is not None:
                self._swaps.attach(chain, form, self._exact)
        for part in self._used:
            self._swaps.attach_part(part.module, part.kind, self._exact)

    def undo(self) -> None:
        self._swaps.set(True)
        self._swaps.undo()
        self._layout.set(False)

    def apply_unmeasured(self, channels_last: bool) -> Report:
        """Everything becomes the first of its forms."""
        choice = self._first_forms()
        self.apply(choice, channels_last)
        return Report(
            self._rows(choice, None), _format_name(channels_last), notes=["without example inputs nothing was measured"]
        )

    def _first_forms(self) -> dict[Chain, Form]:
        return {chain: forms[0] for chain in self.chains if (forms := forms_of(chain))}

    # ---- measuring ----

    def measure(self, example: Example, channels_last: bool | None, tolerance: float | None, rounds: int) -> Report:
        """Finds the fastest variant by trials, applies it and reports."""
        self._say("running the model as it is")
        expected = example.run()
        notes: list[str] = []
        if channels_last is None:
            channels_last = self._prefers_channels_last(example, notes)
        self._layout.set(channels_last)
        try:
            trial = Stopwatch(self.chains, example, self._exact, self._say).run()
            if self._parts:
                time_parts(self._parts, example, self._exact)
                self._used = [part for part in self._used if part.faster]
        finally:
            self._layout.set(False)
        choice = {chain: trial.choose(chain) for chain in self.chains}
        if not any(choice.values()) and not self._used and not (channels_last and self._layout):
            return Report(self._rows(choice, trial), notes=[*notes, "nothing is faster than what the model has"])
        self._say("timing the whole model")
        while True:
            try:
                report = self._race(example, trial, choice, channels_last, expected, tolerance, rounds)
                break
            except _OutputsDiffer as error:
                if not self._reject_blocks(error.allowed):
                    raise RuntimeError(str(error)) from None
        report.notes = notes
        if _speedup(report) > 1:
            self.apply(choice, channels_last)
        else:
            notes.append("left as it was: as a whole the accelerated model is not faster")
            report.memory_format = _format_name(False)
            for row in report.rows:
                row.became = ""
        return report

    def _reject_blocks(self, allowed: float) -> bool:
        """Leaves out the blocks whose own outputs are further off than the model's may be; whether there are any."""
        off = [part for part in self._used if part.is_block and not part.difference <= allowed]
        for part in off:
            part.rejected = f"its outputs must agree to {allowed:.1e}"
        self._used = [part for part in self._used if not part.rejected]
        return bool(off)

    def _prefers_channels_last(self, example: Example, notes: list[str]) -> bool:
        """Whether the model is faster in channels_last, by one run of each with everything accelerated that can be."""
        if any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in self._model.modules()):
            notes.append("memory format left alone: dropout draws its numbers in the order of memory")
            return False
        if not self._layout:
            return False
        choice = self._first_forms()
        seconds = {}
        for channels_last in (False, True):
            name = _format_name(channels_last)
            self._say(f"timing the memory formats: {name}")
            self.apply(choice, channels_last)
            try:
                example.seconds()  # packs the weights
                seconds[channels_last] = example.seconds()
            except Exception as error:
                if not channels_last:
                    raise _does_not_run(error) from error
                # A model may insist on contiguous activations, with `view` for instance.
                notes.append(f"channels_last does not work: {_first_line(error)}")
                return False
            finally:
                self.undo()
        notes.append(
            f"all accelerated: {seconds[True] * 1e3:.1f} ms in channels_last, {seconds[False] * 1e3:.1f} ms as is"
        )
        return seconds[True] < seconds[False]

    def _race(
        self,
        example: Example,
        trial: Trial,
        choice: dict[Chain, Form],
        in_channels_last: bool,
        expected: Outputs,
        tolerance: float | None,
        rounds: int,
    ) -> Report:
        """The whole model in one variant against itself as it was. Leaves it as it was."""
        self.apply(choice, in_channels_last)
        rows = self._rows(choice, trial)
        try:
            try:
                got = example.run()
            except Exception as error:
                raise _does_not_run(error) from error
            far, where = difference(expected, got)
            self._judge(example, expected, far, where, tolerance, rows)

            def seconds(accelerated: bool) -> float:
                self._swaps.set(accelerated)
                self._layout.set(accelerated and in_channels_last)
                return example.seconds()

            before, after = interleaved_ms([lambda: seconds(False), lambda: seconds(True)], rounds)
        finally:
            self.undo()
        return Report(rows, _format_name(in_channels_last), before, after, far)

    def _judge(
        self, example: Example, expected: Outputs, far: float, where: str, tolerance: float | None, rows: list[Row]
    ) -> None:
        """Raises if outputs that are `far` from the expected ones do not agree with them."""
        allowed = _default_tolerance(expected) if tolerance is None else tolerance
        if far <= allowed:
            return
        self._swaps.set(False)
        self._layout.set(False)
        own, _ = difference(expected, example.run())
        if not own <= allowed:
            raise RuntimeError(
                f"accelerate: the model's own outputs differ by {own:.1e} from run to run; it is restored"
            )
        text = f"accelerate: outputs must agree to {allowed:.1e} of their largest magnitude, got {far:.1e} in {where}"
        rounding = example.rounding_error(expected)
        if rounding is not None:
            text += f" (the model's own rounding error is {rounding:.1e})"
            if tolerance is None and far <= _ROUNDING_MARGIN * rounding:
                return
        worst = max(rows, key=lambda row: row.difference or 0.0, default=None)
        if worst is not None and worst.difference:
            text += f"; of the modules, {worst.name} is off the most, by {worst.difference:.1e}"
        raise _OutputsDiffer(text + "; the model is restored", allowed)

    # ---- reporting ----

    def _rows(self, choice: dict[Chain, Form], trial: Trial | None) -> list[Row]:
        """While `choice` is applied."""
        rows = [_row(each, None if each.chain is None else choice.get(each.chain), trial) for each in self._found]
        return rows + [part.row(part in self._used) for part in self._parts]


def _row(found: Found, form: Form, trial: Trial | None) -> Row:
    chain = found.chain
    if chain is None:
        return Row(found.name, type(found.module).__name__, "", reason=found.reason)
    row = Row(found.name, _describe(chain), _new_name(chain, form))
    calls = trial.calls.get(chain.conv, []) if trial is not None else []
    if calls:
        largest = max(calls, key=lambda timing: timing.ms[None])
        row.shape, row.before_ms = largest.shape, largest.ms[None]
        # Of what was left alone, the time that the best alternative would have taken.
        tried = (
            form if form in largest.difference else min(largest.difference, key=largest.ms.__getitem__, default=None)
        )
        if tried is not None:
            row.after_ms, row.difference = largest.ms[tried], largest.difference[tried]
    reasons = []
    if form is FusedAtrousConv2d:
        assert isinstance(chain.conv, FusedAtrousConv2d)
        if row.shape is not None:
            plan = chain.conv.plan(row.shape)
            row.path = plan.path
            reasons.append(plan.reason)
    elif not why_torch_runs(chain.conv, chain.conv.weight):
        reasons.append("torch is faster here" if calls else "not called by the example")
    else:
        reasons.append(why_torch_runs(chain.conv, chain.conv.weight))
    if chain.norm is None and found.reason:
        reasons.append(found.reason)
    row.reason = "; ".join(reasons)
    return row


def _describe(chain: Chain) -> str:
    conv = chain.conv
    text = f"{conv.in_channels}->{conv.out_channels} {conv.kernel_size[0]}x{conv.kernel_size[1]}"
    for name, value, usual in (("stride", conv.stride, (1, 1)), ("rate", conv.dilation, (1, 1))):
        if value != usual:
            text += f" {name} {value[0] if value[0] == value[1] else value}"
    if conv.groups != 1:
        text += f" groups {conv.groups}"
    return " + ".join([text, *["batch norm"] * (chain.norm is not None), *["ReLU"] * (chain.relu is not None)])


def _new_name(chain: Chain, form: Form) -> str:
    if form is None:
        return ""
    folded = ["batch norm"] * (chain.norm is not None) + ["ReLU"] * (form.fuses_relu and chain.relu is not None)
    name = "AtrousConv2d" if form is FusedAtrousConv2d else "Conv2d"
    return " + ".join([name, *folded]) + (" in one" if folded else "")


def _format_name(channels_last: bool) -> str:
    return "channels_last" if channels_last else "unchanged"


def _does_not_run(error: Exception) -> RuntimeError:
    return RuntimeError(f"accelerate: the accelerated model fails, it is restored: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _speedup(report: Report) -> float:
    if report.before_ms is None or report.after_ms is None:
        return 0.0
    return report.before_ms / report.after_ms


def _default_tolerance(outputs: Outputs) -> float:
    return max((_TOLERANCES.get(tensor.dtype, _TOLERANCE) for _, tensor in outputs), default=_TOLERANCE)
