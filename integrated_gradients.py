"""Integrated Gradients for segmentation models: which pixels made the network draw this mask?

For a network f (logit map), an image x and a baseline x', Integrated Gradients is

    IG_i(x) = (x_i - x'_i) * integral over alpha in [0, 1] of dF(x' + alpha (x - x')) / dx_i

(Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017, eq. 1), where the
*target score* F is one number: the mean of the logit (or the probability) over a fixed set of
output pixels, the *target region*. The attributions sum to F(x) - F(x') (completeness). The
*completeness gap* is how far the computed attributions miss this sum; each explanation reports it.

`plain_map` is this equation and nothing else. `IntegratedGradients` computes the same map exactly
to a tolerance, in step batches, and only the part that the target can see. This is the way of an
image, with the places of the code:

    main                argv -> Request: settings, network, data, output       command_line
    load_explainer      checkpoint -> network, and the facts about it          network
    Study.of            settings -> the part that each stage needs             analysis/study
    read_sample         files -> pixels and labels                             data
    fit                 pixels -> the network's input, and its preprocessing   analysis/describe
    explain_with        prediction, targets, baselines -> paths -> the map     here
    describe            explanation -> statistics, checks, verdict             checks, statistics
    write_image         statistics and arrays -> figures and files             results

Four functions go this way, each further than the function before: `explain_image`,
`analyse_image`, `analyse_sample`, `analyse_batch`. From the command line:
`python integrated_gradients.py --help`.
"""

from __future__ import annotations

if __name__ == '__main__':  # --help and errors of usage are answered before torch is imported
    from igseg.start import answer_first

    answer_first()

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igseg.analysis.batch import Batch
from igseg.analysis.describe import ReadImage, describe, explain, fit
from igseg.analysis.image import Explained, ModelInput, open_network, read_baseline
from igseg.analysis.job import (
    Alone,
    Group,
    Share,
    StopSignals,
    device_of_rank,
    hold_folder,
    started_by_torchrun,
)
from igseg.analysis.references import ReferenceImages, other_images, references_of
from igseg.analysis.sample import finish_sample
from igseg.analysis.study import SideFiles, Study
from igseg.analysis.summary import BatchResult
from igseg.analysis.truth import counted_truth
from igseg.command_line import (
    Request,
    around,
    parse,
    say_cost,
    say_letters,
    say_result,
    say_summary,
)
from igseg.data.layouts import DataSource
from igseg.data.pixels import Reading
from igseg.data.samples import Sample, choose_samples, list_samples, single_sample, with_slices
from igseg.engine.engine import GradientEngine
from igseg.engine.memory import peak_memory
from igseg.engine.sampler import AtImage
from igseg.errors import InputError
from igseg.explanation import NO_BASELINE, Cost, Explanation
from igseg.method.baselines import choose_baseline
from igseg.method.choice import Question
from igseg.method.method import Method, build_method, run_method
from igseg.method.rules import Integration
from igseg.method.targets import ChosenBaseline, Prediction, explanations_of
from igseg.method.walk import Task, dtype_name, mask_overlap
from igseg.network.description import NetworkDescription
from igseg.network.facts import NetworkFacts
from igseg.network.kinds import Meaning, NetworkSource
from igseg.network.loading import resolve_device
from igseg.network.outputs import (
    LogitsOf,
    explained_memory,
    frozen,
    segmentation_logits,
    with_chosen_map,
)
from igseg.network.score import Score, Target
from igseg.preprocessing import Placement, Preprocessing
from igseg.program import print_any_name
from igseg.results.export import Output
from igseg.results.files import Description, make_output_folder
from igseg.settings import OF_AN_EXPLANATION, Settings
from igseg.start import run

# --------------------------------------------------------------------------- the method


def plain_map(
    network: Callable[[torch.Tensor], object],
    x: torch.Tensor,
    baseline: torch.Tensor,
    target: Score,
    steps: int,
) -> np.ndarray:
    """Integrated Gradients by the midpoint rule, and nothing else; (C, H, W) float, in units of F.

    network: images (N, C, H, W) -> logits (N, K, h, w), see `segmentation_logits`. x, baseline:
    (1, C, H, W). target: F. steps: how many gradients.
    """
    total = torch.zeros_like(x)
    for step in range(steps):
        point = torch.lerp(baseline, x, (step + 0.5) / steps).detach().requires_grad_()
        with torch.enable_grad():
            score = target(segmentation_logits(network(point), x.shape[-2:])).sum()
            total += torch.autograd.grad(score, point)[0]
    attributions: np.ndarray = (total * (x - baseline) / steps)[0].cpu().numpy()
    return attributions


class IntegratedGradients:
    """Integrated Gradients of a segmentation network, exact to a tolerance, in step batches,
    cropped to the part of the image that the target can see.

    model: any torch.nn.Module that maps (N, C, H, W) to logits (N, K, h, w). It is moved to the
        device and not changed otherwise.
    device: 'auto', 'cuda', 'mps', 'cpu' or a torch.device.
    preprocessing: how inputs were normalised; by default as stored with the model, else as for
        ImageNet with three channels, and not at all (pixels from 0 to 1) with others.
    step_batch: interpolation steps for each pass; by default measured.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: str | torch.device = 'auto',
        preprocessing: Preprocessing | None = None,
        step_batch: int | None = None,
    ) -> None:
        self.device = resolve_device(device)
        self.model = model.to(self.device)
        self.facts = NetworkFacts(self.model, self.device, preprocessing)
        self._step_batch = step_batch
        self._engines: dict[tuple[str | None, str | None], GradientEngine] = {}
        self._gives: str | None = None  # kind of probabilities that the network gives; None: logits
        self._output_map: str | None = None  # which of several maps; None: chosen by its size

    @property
    def preprocessing(self) -> Preprocessing:
        """How inputs are normalised."""
        return self.facts.preprocessing

    @property
    def network(self) -> NetworkDescription:
        """The description of the network, as it is now."""
        return self.facts.look_again()

    @property
    def engine(self) -> GradientEngine:
        """The engine that computes logits and gradients of the network as it was last looked at."""
        output = self._output_map, self._gives
        if output not in self._engines:
            model = with_chosen_map(self.model, self._output_map)
            model = model if self._gives is None else LogitsOf(model, self._gives)
            self._engines[output] = GradientEngine(model, self.device, self._step_batch)
        return self._engines[output]

    def compute_integrated_gradients(
        self,
        input_tensor: torch.Tensor,
        baseline_type: str | torch.Tensor = 'zero',
        num_steps: int = Settings.num_steps,
        target: str | Target | torch.Tensor = 'predicted',
        **options: Any,
    ) -> torch.Tensor:
        """The attributions alone: same shape and device as the input, (C, H, W) or (N, C, H, W),
        with one channel where the method does not tell channels apart.

        Each image of a batch has a target for itself. Options and errors: see `explain`.
        """
        images = input_tensor if input_tensor.ndim == 4 else input_tensor.unsqueeze(0)
        if not len(images):
            raise InputError('input_tensor holds no image')
        results = [
            self.explain(
                image, target=target, baseline_type=baseline_type, num_steps=num_steps, **options
            ).attributions
            for image in images
        ]
        return torch.stack(results).reshape(*input_tensor.shape[:-3], *results[0].shape)

    def explain(
        self,
        input_tensor: torch.Tensor,
        target: str | Target | torch.Tensor = 'predicted',
        baseline_type: str | torch.Tensor = 'zero',
        num_steps: int = Settings.num_steps,
        rule: str = Settings.rule,
        **options: Any,
    ) -> Explanation:
        """Explain one image. Arguments, options and errors: see `explain_targets`."""
        return self.explain_targets(
            input_tensor, [target], baseline_type, num_steps, rule, **options
        )[0]

    def explain_targets(
        self,
        input_tensor: torch.Tensor,
        targets: Sequence[str | Target | torch.Tensor],
        baseline_type: str | torch.Tensor = 'zero',
        num_steps: int = Settings.num_steps,
        rule: str = Settings.rule,
        *,
        truth: np.ndarray | None = None,
        placement: Placement | None = None,
        skip_empty: bool = False,
        progress: bool = False,
        references: torch.Tensor | None = None,
        **options: Any,
    ) -> list[Explanation]:
        """Explain several targets of one image; they share the forward passes.

        input_tensor: (C, H, W) or (1, C, H, W), normalised as the model expects.
        targets: each a spec (a key of TARGETS, see --help), a Target, or an (h, w) boolean mask
            of output pixels. 'each-object' stands for all objects, a target each.
        baseline_type: a key of BASELINES, an image file, or a tensor of the input's shape in
            the same normalised space.
        num_steps, rule, and as options method (one), method_option, no_multiply, tolerance,
            max_steps, score, threshold, baseline_draws, seed, on_empty, min_object_area,
            output_kind, background_class, outputs, output_map, precision, precision_tolerance: see
            `Settings` and --help.
        truth: (h, w) class labels, for target 'truth'. placement: for target 'pixel:X,Y' in
            original image coordinates; without it X,Y are output pixels.
        skip_empty: leave out targets whose region holds no pixel, unless all are empty.
        references: (n, C, H, W), other images, for methods that need such; by default the images
            of `reference_dir`.

        Raises InputError: wrong shapes or values, not enough memory; EmptyTargetError: a target
        region holds no pixel; NonFiniteError: logits or gradients that are not finite. With
        reduced precision they are first computed again in float32.
        """
        if unknown := sorted(options.keys() - OF_AN_EXPLANATION):
            raise TypeError(
                f'unexpected {", ".join(unknown)} (options: {", ".join(OF_AN_EXPLANATION)})'
            )
        settings = Settings(num_steps=num_steps, rule=rule, **options)
        if len(settings.methods) > 1:
            raise InputError('an explanation is of one method (take one after the other)')
        (method,) = map(build_method, settings.methods)
        self.facts.description.check_input(tuple(input_tensor.shape))
        channels = input_tensor.shape[-3]
        preprocessing = self.facts.preprocessing_for(channels)
        check_normalised(preprocessing)
        others = references if references is not None else references_of(settings, ())
        question = replace(settings.question, targets=targets, skip_empty=skip_empty,
                           **baseline_fields(baseline_type, channels))  # fmt: skip
        model_input = ModelInput(input_tensor, preprocessing, truth, placement)
        return self.explain_with(
            model_input, question, settings.integration, method, others, progress
        )

    def explain_with(
        self,
        given: ModelInput,
        question: Question,
        integration: Integration,
        method: Method,
        references: ReferenceImages | torch.Tensor | None = None,
        progress: bool = False,
    ) -> list[Explanation]:
        """The explanation of each target. `explain_targets` is the same with plain arguments."""
        started = time.perf_counter()
        x, notes = self.see(given.x, question.meaning)  # (1, C, H, W)
        engine, network = self.engine, self.facts.description_for(question.meaning)
        preprocessing = given.preprocessing
        if engine.network is None:  # later, the method notices it itself
            with frozen(self.model), explained_memory(self.device):
                method.check_network(self.model, x.to(engine.dtype))
        with engine.running(x, self.facts.state):
            before = engine.forward_passes, engine.gradient_evaluations
            logits = engine.predict(x)  # (1, K, h, w)
            network = replace(network, place=engine.place)
            prediction = Prediction.of(network, logits, question, given.truth, given.placement)
            crops = engine.compared_crops(x, logits, prediction.targets)
            at_image = AtImage(x, logits, prediction.targets, None, crops)
            baseline, inputs = choose_baseline(
                engine, x, prediction, question, preprocessing, given.placement
            )
            others, left_out = other_images(references, method.most_references, x, preprocessing)
            predicted = network.foreground(prediction.masks)
            overlap = partial(mask_overlap, predicted, network, question.threshold)
            task = Task(engine, at_image, inputs, integration, overlap, others)
            baseline = method_baseline(method, task, baseline, preprocessing)
            results, retried = run_method(method, task, progress)
            forward_passes = engine.forward_passes - before[0]
            gradients = engine.gradient_evaluations - before[1]
        assert engine.preparation is not None  # the engine has made it before it ran
        cost = Cost(
            gradient_evaluations=gradients,
            forward_passes=forward_passes,
            seconds=time.perf_counter() - started,
            step_batch=engine.step_batch.size,
            peak_memory_bytes=peak_memory(self.device),
            precision=dtype_name(results[0].reduced or engine.dtype),
            precision_deviation=results[0].deviation,
            retried=retried,
            preparation=engine.preparation,
            cropping=crops.cropping,
        )
        compares = method.declares.baseline != NO_BASELINE
        common = {
            'notes': (*notes, *baseline.notes, *left_out, *engine.notes, *prediction.notes()),
            'difference': baseline.difference(given.placement) if compares else None,
            'again': partial(method.map_for_check, integration.seed, others),
            'rule': method.rule_name(integration.rule),
            'tolerance': integration.tolerance,
        }
        explanations = explanations_of(method.declares, prediction, baseline, results, cost, common)
        device = given.x.device
        return [replace(e, attributions=e.attributions.to(device)) for e in explanations]

    def see(
        self, input_tensor: torch.Tensor, meaning: Meaning
    ) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Look at the network again, and see for an input, (C, H, W) or (1, C, H, W), whether the
        network gives logits or probabilities. Returns the input as (1, C, H, W) on the device, and
        notes about the outputs. Raises InputError."""
        self.facts.look_again()
        x = self.facts.checked(input_tensor)
        self._gives, notes = self.facts.see_outputs(x, meaning)
        self._output_map = meaning.output_map
        return x, notes

    def prepare(self, input_tensor: torch.Tensor, meaning: Meaning | None = None) -> None:
        """Prepare the private copy of the network on this input, (C, H, W) or (1, C, H, W). Without
        this call it is prepared on the first input that is explained. Raises InputError as
        `explain_targets` does."""
        x, _ = self.see(input_tensor, meaning or Meaning())
        with self.engine.running(x, self.facts.state):
            pass


def check_normalised(fit: Preprocessing) -> None:
    """Raise InputError if inputs are normalised with the mean and deviation of each image, which
    cannot be read off a tensor."""
    if fit.of_each == 'zscore' and not any(fit.mean) and set(fit.std) == {1.0}:
        raise InputError(
            'the input was normalised with the mean and deviation of its image, which a tensor '
            'does not tell (use explain_image, or preprocessing.of_image(image))'
        )


def baseline_fields(baseline: str | Path | torch.Tensor | None, channels: int) -> dict[str, Any]:
    """The fields of a `Question` for a baseline: a key of BASELINES, an image file, or a tensor.
    None stands for the default baseline."""
    baseline = Settings.baseline if baseline is None else baseline
    if isinstance(baseline, (str, Path)):
        image = read_baseline(str(baseline), channels, Reading())
        return {'baseline': str(baseline), 'baseline_image': image}
    tensors = [baseline] if isinstance(baseline, torch.Tensor) else list(baseline)
    return {'baseline': 'tensor', 'baselines': tensors}


def method_baseline(
    method: Method, task: Task, baseline: ChosenBaseline, fit: Preprocessing
) -> ChosenBaseline:
    """The baseline that a method compares the image with: chosen by the method, else by the
    user."""
    chosen = method.baseline(task)
    if chosen is None:
        return baseline
    name, x = chosen
    return replace(baseline, name=name, pictures=[fit.to_pixels(x)])


# --------------------------------------------------------------------------- the ladder


def explain_image(
    ig: IntegratedGradients,
    image: np.ndarray,
    settings: Settings,
    truth: np.ndarray | None = None,
    progress: bool = False,
    samples: Sequence[Sample] = (),
) -> list[Explained]:
    """Explain an image as it was read: (H0, W0, C), 0-255, with (H0, W0) truth labels if known.

    Returns for each target, and each method, the explanation and the truth of the explained class
    at model resolution, (H, W) bool or None. Of several targets, empty ones are left out. If all
    are empty and `settings.on_empty` is 'image', the whole image is explained. samples: other
    images, for methods that need such, if `settings.reference_dir` names no folder.
    """
    study = Study.of(ig, settings, samples)
    read = ReadImage(image, counted_truth(study, truth)[0])
    return explain(study, fit(study, read), progress)


def analyse_image(
    ig: IntegratedGradients,
    name: str,
    image: np.ndarray,
    truth: np.ndarray | None,
    settings: Settings,
    progress: bool = False,
    class_names: Mapping[int, str] | None = None,
    samples: Sequence[Sample] = (),
) -> list[Description]:
    """Explain an image: for each target its statistics, and the arrays of its figures.

    Arguments and errors as for `explain_image`; the figures are
    `attribution_figure(view_of(arrays), statistics)` and `channels_figure(...)`. class_names: of
    the dataset, by the numbers in its masks; for classes that neither settings nor network name.
    """
    study = Study.of(ig, settings, samples)
    truth, notes = counted_truth(study, truth)
    read = ReadImage(image, truth, class_names=class_names or {}, notes=notes)
    network_input = fit(study, read)
    explained = explain(study, network_input, progress)
    return describe(study, name, read, network_input, explained, progress)


describe_targets = analyse_image  # its name in earlier versions


def describe_image(
    ig: IntegratedGradients,
    name: str,
    image: np.ndarray,
    truth: np.ndarray | None,
    settings: Settings,
    progress: bool = False,
    samples: Sequence[Sample] = (),
) -> Description:
    """The first (with one target: the only) entry of `analyse_image`."""
    return analyse_image(ig, name, image, truth, settings, progress, samples=samples)[0]


def analyse_sample(
    ig: IntegratedGradients,
    sample: Sample,
    settings: Settings,
    output_dir: Path,
    progress: bool = False,
    figures: str = 'all',
    overwrite: bool = False,
    samples: Sequence[Sample] = (),
) -> list[dict[str, Any]]:
    """Explain one sample and write its files for each target.

    figures: a key of FIGURES. Returns the contents of the statistics files. A sample that was
    finished before with the same settings, image, truth and network is read back instead,
    unless `overwrite` is set. samples: see `explain_image`. Raises InputError for an unusable
    sample, OutputError if writing fails.
    """
    output = Output(output_dir, figures, overwrite)
    return finish_sample(Study.of(ig, settings, samples), sample, output, progress)


def analyse_batch(
    ig: IntegratedGradients,
    samples: Sequence[Sample],
    settings: Settings,
    output_dir: Path,
    before_image: Callable[[], object] = lambda: None,
    figures: str = 'all',
    overwrite: bool = False,
    share: Share | None = None,
) -> BatchResult:
    """Explain this process's share of the samples. On rank 0, write the summary of all samples.

    Arguments: see `batch_integrated_gradients_analysis`.
    """
    output = Output(output_dir, figures, overwrite)
    batch = Batch(Study.of(ig, settings, samples), samples, output)
    return batch.run(before_image, share or Alone())


# --------------------------------------------------------------------------- whole runs


def load_explainer(source: NetworkSource, settings: Settings) -> IntegratedGradients:
    """The `IntegratedGradients` of a checkpoint's network, under these settings."""
    model, preprocessing = open_network(source, settings)
    return IntegratedGradients(model, source.device, preprocessing, settings.step_batch)


def batch_integrated_gradients_analysis(
    model_path: str | Path,
    data_dir: str | Path,
    output_dir: str | Path = 'integrated_gradients_results',
    num_samples: int | None = 10,
    baseline_type: str = 'zero',
    num_steps: int = Settings.num_steps,
    *,
    split: str | None = None,
    images_dir: str | Path | None = None,
    masks_dir: str | Path | None = None,
    mask_suffix: str | None = None,
    mask_prefix: str | None = None,
    mask_name: str | None = None,
    encoder: str | None = None,
    architecture: str | None = None,
    weights_key: str | None = None,
    model_options: dict[str, object] | None = None,
    model_factory: str | None = None,
    allow_unused: bool = False,
    device: str | torch.device = 'auto',
    figures: str = 'all',
    overwrite: bool = False,
    export: str | None = None,
    before_image: Callable[[], object] = lambda: None,
    share: Share | None = None,
    **options: Any,
) -> BatchResult:
    """Explain images of a dataset split, evenly spaced through the split, and write a summary.

    num_samples: None for all. images_dir, masks_dir, mask_suffix, mask_prefix, mask_name: for a
    dataset in no known layout. figures: what to draw of each image, a key of FIGURES. overwrite:
    compute finished images again. export: a key of EXPORTS, to also write maps in the geometry of
    their images. before_image: called before each image; an exception from it ends the batch, and
    the summary is still written. share: of a process in a group that shares the images. On rank 0
    the result is that of the whole group, on other ranks it is empty. options: more fields of
    `Settings`.

    An image that cannot be used or written is listed in the result and does not stop the others.
    Raises InputError for an unusable model, folder or setting, or a folder that another run is
    using; OutputError if nothing can be written there.
    """
    settings = Settings(baseline=baseline_type, num_steps=num_steps, **options)
    source = NetworkSource(model_path, device, encoder, architecture, weights_key, model_options,
                           model_factory, allow_unused)  # fmt: skip
    output = Output(Path(output_dir), figures, overwrite, export)
    images, masks = (None if folder is None else Path(folder) for folder in (images_dir, masks_dir))
    data = DataSource(Path(data_dir), split, images, masks, mask_suffix, mask_prefix, mask_name)
    return analyse_dataset(source, data, num_samples, settings, output, before_image,
                           share or Alone())  # fmt: skip


def analyse_dataset(
    network: NetworkSource,
    data: DataSource,
    num_samples: int | None,
    settings: Settings,
    output: Output,
    before_image: Callable[[], object],
    share: Share,
) -> BatchResult:
    """The same as `batch_integrated_gradients_analysis`, with its arguments as objects."""
    all_samples = with_slices(list_samples(data.data_dir, source=data), settings.reading)
    samples = choose_samples(all_samples, num_samples)
    files = SideFiles.of(settings, all_samples)
    for note in samples[0].notes if share.rank == 0 else ():
        print(f'note: {note}', file=sys.stderr)
    make_output_folder(output.folder)
    with hold_folder(output.folder) if share.rank == 0 else contextlib.nullcontext():
        share.begin()
        study = Study.of(load_explainer(network, settings), settings, files=files)
        if share.rank == 0:
            say_letters(output, samples)
        result = Batch(study, samples, output).run(before_image, share)
        if share.rank == 0:
            output.exported([statistics['folder'] for statistics in result.images])
        return result


def run_single(request: Request) -> int:
    """Explain one image and print its statistics."""
    settings, output = request.settings, request.output
    assert request.image_path is not None  # `parse` has checked it
    say_cost(settings, request.device)
    # A bad image is reported before the model is loaded.
    sample = single_sample(request.image_path, request.mask_path, request.data)
    sample.check(settings.reading)
    files = SideFiles.of(settings, around(sample))
    make_output_folder(output.folder)
    with hold_folder(output.folder):
        study = Study.of(load_explainer(request.network(), settings), settings, files=files)
        say_letters(output, [sample])
        by_target = finish_sample(study, sample, output, progress=True)
        maps = output.exported([statistics['folder'] for statistics in by_target])
    say_result(by_target, output, maps)
    return 0


def run_batch(request: Request, stop: StopSignals) -> int:
    """Explain a dataset split and print its summary. Returns 1 if an image failed.

    Under torchrun, this process explains its share, and rank 0 prints.
    """
    share = Group.of_torchrun() if started_by_torchrun() else Alone()
    if share.rank == 0:
        say_cost(request.settings, request.device)
    network = request.network(device_of_rank(request.device, share.size))
    output = request.output
    result = analyse_dataset(network, request.data, request.num_samples, request.settings, output,
                             stop.check, share)  # fmt: skip
    return say_summary(result, output) if share.rank == 0 else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    print_any_name()
    stop = StopSignals()
    try:
        with stop:
            request = parse(argv)
            if request.mode == 'single':
                return run_single(request)
            return run_batch(request, stop)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; the same command goes on where this one stopped', file=sys.stderr)
        return stop.exit_status


# --------------------------------------------------------------------------- what is handed on

# Names that users import from this module, though it does not need them itself, by the module of
# the package where they stand. Each is imported only when it is used.
HANDED_ON = {
    'analysis.image': 'build_baselines input_preprocessing',
    'checks.checks': 'evaluate evaluate_explanation',
    'checks.curves': 'superpixels',
    'checks.effort': 'EFFORTS',
    'checks.subject': 'Subject subject_of',
    'checks.verdict': 'Thresholds statistics_text verdict_of',
    'command_line': 'build_parser settings_from',
    'data.masks': 'read_mask',
    'data.pixels': 'LoadedImage load_image read_image',
    'data.truth': 'TruthReading read_label_map',
    'errors': 'EmptyTargetError NonFiniteError OutputError',
    'explanation': 'Preparation Trend completeness_gap',
    'maps': 'mask_scores',
    'method.choice': 'BASELINES BaselineKind CANDIDATES METHODS MethodKind TARGETS TargetKind '
    'form_of',
    'method.method': 'build_methods',
    'method.rules': 'RULE_NAMES',
    'method.targets': 'TargetContext build_target',
    'network.description': 'describe_network',
    'network.kinds': 'ARCHITECTURES',
    'network.loading': 'load_model',
    'preprocessing': 'IMAGENET_MEAN IMAGENET_STD as_picture',
    'results.export': 'EXPORTS',
    'results.figures': 'attribution_figure channels_figure methods_figure',
    'results.files': 'FIGURES load_view redraw_figures view_of',
    'statistics': 'METRICS STATISTICS explanation_statistics',
}


def __getattr__(name: str) -> Any:
    """A name that is handed on (PEP 562)."""
    for module, names in HANDED_ON.items():
        if name in names.split():
            return getattr(importlib.import_module(f'igseg.{module}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    """The names of this module, and the names that it hands on."""
    return sorted({*globals(), *' '.join(HANDED_ON.values()).split()})


__all__ = [  # `import *` gives the names of this module that users write, and HANDED_ON
    'BatchResult', 'Cost', 'Explanation', 'InputError', 'Integration', 'IntegratedGradients',
    'ModelInput', 'NetworkDescription', 'Preprocessing', 'Question', 'Reading', 'Sample',
    'Settings', 'Study', 'Target', 'analyse_batch', 'analyse_image', 'analyse_sample',
    'batch_integrated_gradients_analysis', 'choose_samples', 'describe_image', 'describe_targets',
    'explain_image', 'list_samples', 'load_explainer', 'main', 'plain_map', 'references_of',
    'resolve_device', 'segmentation_logits', 'single_sample',
    *' '.join(HANDED_ON.values()).split(),
]  # fmt: skip

if __name__ == '__main__':
    sys.exit(run(main))
