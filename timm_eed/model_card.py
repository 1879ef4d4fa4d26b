"""The model card of a published model: what it is, what each exit costs and gives, how to load it both ways."""
import logging
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import model_entrypoint

from .analysis import METRIC_TITLES, shown_metrics
from .figures import TradeOff, trade_off_figure
from .multi_exit import MultiExitWrapper
from .profiling import profile_with_ensemble

__all__ = [
    'ExitResult', 'accuracy_figure', 'exit_results', 'make_model_card', 'registering_package', 'write_model_card']

_logger = logging.getLogger(__name__)

FIGURE = 'eed/accuracy.png'
_METRIC_TYPES = {'top1': 'accuracy', 'top5': 'accuracy', 'map': 'mean_average_precision', 'macro_f1': 'f1'}  # the Hub's
TIMM_CITATION = """@misc{rw2019timm,
  author = {Ross Wightman},
  title = {PyTorch Image Models},
  year = {2019},
  publisher = {GitHub},
  journal = {GitHub repository},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}"""


class ExitResult(NamedTuple):
    """Cost and accuracy of one classifier.

    exit: exit1, .., main, ensemble. gflops, params: as in `timm_eed.profile`; the ensemble costs all of them.
    scores: The two metrics that are shown (%), by name (top1 and top5, or map and macro_f1), None where not measured.
    """
    exit: str
    gflops: float
    params: int
    scores: Dict[str, Optional[float]]


def exit_results(
        model: MultiExitWrapper,
        metrics: Optional[Mapping[str, float]] = None,
        input_size: Optional[Tuple[int, int, int]] = None,
) -> List[ExitResult]:
    """A row per classifier, shallow to deep, then the ensemble.

    Args:
        model: A multi-exit model.
        metrics: Percentages, named as the evaluators name them: `top1`, `top1_exit1`, .., or `map`, `map_exit1`, ..
        input_size: Image size (C, H, W) that costs are counted for; the model's own when None.
    """
    metrics = metrics or {}
    rows = []
    for name, _, gflops, params in profile_with_ensemble(model, input_size):
        suffix = '' if name == 'main' else f'_{name}'
        scores = {metric: metrics.get(f'{metric}{suffix}') for metric in shown_metrics(metrics)}
        rows.append(ExitResult(name, gflops, params, scores))
    return rows


def accuracy_figure(rows: Sequence[ExitResult], path: Union[str, Path, BinaryIO]) -> bool:
    """Draw accuracy against GFLOPs into a PNG file; False, with a note in the log, where there is nothing to draw.

    Args:
        rows: Results as `exit_results` gives them.
        path: The file, by name or open.
    """
    metric = next(iter(rows[0].scores))
    measured = [TradeOff(row.exit, accuracy, {'GFLOPs per image': row.gflops}) for row in rows
                if (accuracy := row.scores[metric]) is not None]
    if len(measured) < 2:
        return False
    try:
        figure = trade_off_figure(measured, METRIC_TITLES[metric])
    except ValueError as error:
        _logger.warning(f'No figure for the model card: {error}')
        return False
    figure.savefig(path, format='png', metadata={'Software': None})
    return True


def make_model_card(
        model: MultiExitWrapper,
        repo_id: str,
        *,
        metrics: Optional[Mapping[str, float]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
        license: Optional[str] = None,
        license_name: Optional[str] = None,
        license_link: Optional[str] = None,
        dataset_name: Optional[str] = None,
        dataset_split: str = 'validation',
        datasets: Optional[Union[str, Sequence[str]]] = None,
        base_model: Optional[Union[str, Sequence[str]]] = None,
        description: Optional[str] = None,
        recipe: Optional[Mapping[str, Any]] = None,
        results: Optional[Mapping[str, Mapping[str, float]]] = None,
        citation: Optional[Union[str, Sequence[str]]] = None,
        figure: Optional[str] = None,
        rows: Optional[Sequence[ExitResult]] = None,
) -> ModelCard:
    """The card of a model: metadata with a result per exit (model-index), tables, loading snippets, recipe.

    Args:
        model: The published model.
        repo_id: Repo as 'user/name'.
        metrics: Accuracies (%) of these very weights, named as in `exit_results`.
        data_config: Preprocessing of the data (`input_size`, ..), for which costs are counted.
        license: Licence of the weights, an identifier of the Hub as in 'apache-2.0'; no licence is claimed if None.
        license_name, license_link: Further details where the licence is 'other'.
        dataset_name: The data set by its name.
        dataset_split: The split that was measured.
        datasets: The data sets on the Hub, as in 'imagenet-1k'.
        base_model: Hub id of the weights that training started from.
        description: A few sentences.
        recipe: Training flags.
        results: Several runs: `mean`, `std` and `n` by the metric's name.
        citation: BibTeX entries, beside timm's own.
        figure: Path in the repo of the figure that `accuracy_figure` made.
        rows: What `exit_results` gives for these metrics, where it is known already.

    Raises:
        ValueError: If the metadata is not what the Hub takes.
    """
    size = (data_config or {}).get('input_size')
    if rows is None:
        rows = exit_results(model, metrics, tuple(size) if size else None)
    name = repo_id.split('/')[-1]
    ids = [datasets] if isinstance(datasets, str) else list(datasets or [])
    dataset = dataset_name or (ids[0] if ids else 'unnamed data')
    data = ModelCardData(
        model_name=name,
        library_name='timm',  # what the Hub shows a snippet for, and what loads it
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_eed', 'early-exit', 'multi-exit'],
        license=license,
        license_name=license_name,
        license_link=license_link,
        datasets=ids or None,
        base_model=base_model,  # type: ignore[arg-type]
        metrics=sorted({_METRIC_TYPES[metric] for metric in rows[0].scores}),
        eval_results=_eval_results(rows, dataset, ids[0] if ids else dataset, dataset_split) or None,
    )
    architecture = model.pretrained_cfg['architecture']
    parts = [
        f'# {name}',
        description or '',
        f'A `{architecture}` with exits, small classifiers behind its stages, made with timm_eed. Plain timm loads it '
        'as an ordinary model; the exits are extra files, which timm never fetches.',
        '## Classifiers',
        _table(model, rows, results),
        f'Measured on {dataset} ({dataset_split}); cost per image of '
        f"{'x'.join(map(str, size)) if size else 'the default size'}, GFLOPs counting 2 per multiply-add."
        if metrics else '',
        f'![Accuracy against GFLOPs]({figure})' if figure else '',
        '## Loading',
        _snippets(repo_id, architecture),
        _early_exit(model.early_exit_config),
        f'## Training\n\n```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False).strip()}\n```' if recipe else '',
        '## Citation',
        *(f'```bibtex\n{entry.strip()}\n```' for entry in _entries(citation)),
    ]
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(part for part in parts if part) + '\n')


def write_model_card(
        folder: Union[str, Path],
        model: MultiExitWrapper,
        repo_id: str,
        *,
        metrics: Optional[Mapping[str, float]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
        **card_kwargs: Any,
) -> ModelCard:
    """Write README.md, and the figure where there are accuracies to draw, into a model's folder.

    Args:
        folder: The folder.
        model, repo_id, metrics, data_config, card_kwargs: See `make_model_card`.

    Raises:
        ValueError: As `make_model_card`.
    """
    root = Path(folder)
    size = (data_config or {}).get('input_size')
    (root / FIGURE).parent.mkdir(parents=True, exist_ok=True)
    rows = exit_results(model, metrics, tuple(size) if size else None)
    drawn = accuracy_figure(rows, root / FIGURE)
    try:
        card = make_model_card(
            model, repo_id, metrics=metrics, data_config=data_config, figure=FIGURE if drawn else None, rows=rows,
            **card_kwargs)
    except TypeError as error:
        raise ValueError(f'model card: {error}') from error
    (root / 'README.md').write_text(str(card), encoding='utf-8')
    return card


def _eval_results(rows: Sequence[ExitResult], dataset: str, dataset_id: str, split: str) -> List[EvalResult]:
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset_id,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=_METRIC_TYPES[metric],
            metric_name=f'{METRIC_TITLES[metric]}{" accuracy" * metric.startswith("top")}, {row.exit}',
            metric_value=round(value, 4),
            metric_args={'exit': row.exit},
        )
        for row in rows for metric, value in row.scores.items() if value is not None
    ]


def _table(
        model: MultiExitWrapper,
        rows: Sequence[ExitResult],
        results: Optional[Mapping[str, Mapping[str, float]]],
) -> str:
    modules = {f'exit{i}': info.module for i, info in enumerate(model.exit_info(), start=1)}
    main = next(row.gflops for row in rows if row.exit == 'main')
    first, second = rows[0].scores
    head = ['classifier', 'behind', 'GFLOPs', 'share', 'parameters', METRIC_TITLES[first], METRIC_TITLES[second]]
    lines = []
    for row in rows:
        cells = [row.exit, f'`{modules[row.exit]}`' if row.exit in modules else '', f'{row.gflops:.4g}',
                 f'{100 * row.gflops / main:.1f} %', f'{row.params / 1e6:.2f} M',
                 *map(_percent, row.scores.values())]
        if results:
            cells.append(_spread(results.get(first if row.exit == 'main' else f'{first}_{row.exit}')))
        lines.append(cells)
    if results:
        head.append(f'{METRIC_TITLES[first]} over runs')
    return '\n'.join(f"| {' | '.join(cells)} |" for cells in [head, ['---'] * len(head), *lines])


def _percent(value: Optional[float]) -> str:
    return '' if value is None else f'{value:.2f} %'


def _spread(result: Optional[Mapping[str, float]]) -> str:
    if not result:
        return ''
    spread = f" ± {result['std']:.2f}" if result.get('std') is not None else ''
    return f"{result['mean']:.2f}{spread} % (n = {result.get('n', 1)})"


def registering_package(architecture: str) -> Optional[str]:
    """The module to import before timm knows an architecture; None for timm's own."""
    module = model_entrypoint(architecture).__module__
    package = module.split('.')[0]
    if package == 'timm':
        return None
    return package if package == __package__ else module


def _snippets(repo_id: str, architecture: str) -> str:
    package = registering_package(architecture)
    first = f'import {package}  # first: it registers {architecture} with timm\n' if package else ''
    also = f'{first}import timm_eed\n' if package != 'timm_eed' else first
    note = (f'`import {package}` comes first, also with plain timm: timm alone does not know `{architecture}`.\n\n'
            if package else '')
    return f"""{note}The main network alone, with timm:

```python
{first}import timm

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

With all exits:

```python
{also}
model = timm_eed.from_pretrained('{repo_id}').eval()
out = model.forward_exits(x)  # out.logits: [B, classes] per classifier, shallow to deep, the main network last
```"""


def _early_exit(config: Optional[Dict[str, Any]]) -> str:
    if not config:
        return ''
    values = ', '.join('never' if value is None else f'{value:.4g}' for value in config['thresholds'])
    return (f"## Early exit\n\nCalibrated with policy `{config['policy']}`, thresholds {values}; they come with the "
            'model: `timm_eed.EarlyExit(model, **model.early_exit_config)`.')


def _entries(citation: Optional[Union[str, Sequence[str]]]) -> List[str]:
    return ([citation] if isinstance(citation, str) else list(citation or [])) + [TIMM_CITATION]
