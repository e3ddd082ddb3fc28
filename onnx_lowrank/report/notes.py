"""What the figures of a run mean for the user, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lowrank import runtime
from onnx_lowrank.calibration.moments import LONGEST_PATCH, MAX_PATCH
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.report.data import TargetResult
from onnx_lowrank.rewriting.rewrite import LayerReport
from onnx_lowrank.verification.verify import Accuracy, Latency

MUCH = 0.03
"""Loss of a metric that is a share from which on the user is told what keeps more of it."""

BUSY = 1.25
"""Times that vary by more than this factor do not tell plans apart."""

SHARES = ("top1", "top5", "agreement")
"""Metrics of which that can be said."""


def on_target(planner: Planner, results: Sequence[TargetResult]) -> tuple[str, ...]:
    """What is known of the target, and what is not."""
    target, provider = planner.target, planner.config.provider
    if target.name == "cpu":
        return ()
    notes = [
        f"target {result.name} takes the result worse than the original: do not use it there"
        for result in results
        if not result.met
    ]
    if not results and not planner.timed_on_target and target.without:
        notes.append(f"how {target.name} cuts the models is not told without it; checked here: {target.without}")
    if planner.target.results:
        notes.append("run `bench.py --pair ORIGINAL RESULT` on the device to measure what is predicted here")
    if not planner.timed_on_target:
        notes.append(f"times are those of {provider} on this machine, and say nothing of {target.name}")
        if planner.config.quantize != "none":
            notes.append(
                f"which layers stay in floating point, and signs, were chosen by times of {provider} on this machine"
            )
    return tuple(notes)


def of_provider(latency: Latency) -> tuple[str, ...]:
    """What the provider left to others, and whether it is the device that it is called after."""
    return tuple(note for note in (latency.fallback, runtime.simulated(latency.provider)) if note)


def advice(planner: Planner, layers: Sequence[LayerReport], accuracy: Accuracy, latency: Latency) -> tuple[str, ...]:
    """What the figures mean for the user."""
    notes = []
    if planner.config.calibrate is None and layers:
        notes.append(
            "no calibration data was given: the weights alone decided; of what accuracy they lose, a few hundred unlabelled "
            "samples (--calibrate) bring most back"
        )
    if accuracy.samples and planner.config.evaluate is None and planner.config.calibrate is not None:
        notes.append(
            "accuracy is that on the calibration samples, which tell less than others would: give --evaluate DATA"
        )
    if layers and planner.config.max_drop is None and accuracy.metric in SHARES and accuracy.drop > MUCH:
        notes.append(
            f"{accuracy.metric} fell by {accuracy.drop:.3f}: --calibrate, a milder budget, --max-drop or --finetune distill "
            f"keeps more"
        )
    used, given = planner.fitting.used
    if used < given:
        notes.append(
            f"layers were fitted on {used} of {given} calibration samples: the activations of more do not fit into memory"
        )
    fitting = planner.fitting
    tied = {name: group.names for group in planner.subject.groups for name in group.names}
    long = [x.name for x in layers if fitting.wanted and not fitting.fits(x.decomposition, tied[x.name])]
    if long:
        notes.append(
            f"{len(long)} layer(s) see more than {MAX_PATCH:,} numbers at once, and were decomposed by their weights alone: "
            f"{', '.join(long[:3])}; svd and channel_svd are fitted to up to {LONGEST_PATCH:,}"
        )
    if planner.unrest > BUSY:
        notes.append(
            f"the machine was busy while the plan was made: the original took up to {planner.unrest:.1f} times as long as at best, and "
            f"what a plan takes is not sure; on a quiet one it may lose less for the same time"
        )
    slower = latency.speedup_high_95 < 1 and planner.timed_on_target
    if slower and planner.config.drop_dead_channels and planner.block % runtime.block_size():
        notes.append(
            f"the result is slower than the original ({latency.speedup:.2f}x): with --align {planner.block}, channels that are left are no "
            f"whole blocks of this machine's kernels; leave --align out where time counts"
        )
    elif slower and layers:
        notes.append(
            f"the result is slower than the original ({latency.speedup:.2f}x): its layers are too small for this machine "
            f"to gain; use --max-drop, or leave layers out with --exclude"
        )
    foldable = planner.subject.foldable if planner.config.quantize == "none" else ()  # eight bits fold them anyway
    if foldable:
        notes.append(
            f"{len(foldable)} shortcut(s) slice and pad, which takes tensors out of the layout of convolutions: "
            f"--fold-shortcuts writes them as convolutions, for the same function"
        )
    notes += of_provider(latency)
    if accuracy.broken:
        notes.append(f"{accuracy.broken} sample(s) give NaN or infinity: do not use this model")
    stuck = [layer.name for layer in layers if not layer.converged]
    if stuck:
        notes.append(f"{len(stuck)} factorisation(s) stopped before they converged: {', '.join(stuck[:3])}")
    return tuple(notes)
