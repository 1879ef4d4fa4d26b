"""Pictures of trained exits (extra `plot`): each function takes numbers and gives a matplotlib figure.

Figure numbers are those of 'Exit-Ensemble Distillation'.
"""
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np

from .curves import Group, measured_epochs

__all__ = ['SPLITS', 'TradeOff', 'curves_figure', 'dissimilarity_figure', 'right_wrong_figure', 'trade_off_figure']

SPLITS = {'train': 'training images', 'eval': 'validation images'}


class TradeOff(NamedTuple):
    """What one way to answer images costs and gives.

    name: exit1, .., main (all images answered there), ensemble (of all), or early exit (any number of rows).
    accuracy: Top-1 or another metric (%). costs: By what the axis says, as in {'GFLOPs per image': 1.2}.
    """
    name: str
    accuracy: float
    costs: Dict[str, float]


def _figure(rows: int, columns: int, width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('pictures need matplotlib: pip install "timm-eed[plot]"') from None
    figure = Figure(figsize=(columns * width, rows * height), layout='constrained', dpi=100)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _line(axes: Any, values: np.ndarray, color: str, label: str) -> None:
    """Mean over runs with a band of one standard deviation, [runs, epochs]; epochs that were not measured are left out.
    """
    epochs = measured_epochs(values)
    mean = values[:, epochs].mean(0)
    axes.plot(epochs + 1, mean, color=color, label=label, linewidth=1.4)
    if len(values) > 1:
        std = values[:, epochs].std(0, ddof=1)
        axes.fill_between(epochs + 1, mean - std, mean + std, color=color, alpha=.2, linewidth=0)


def curves_figure(groups: Sequence[Group]) -> Any:
    """Figs. 3 and 5: top-1 over epochs. One kind of run: a line per classifier; several: a panel per classifier.

    Bands are one standard deviation over the runs of a group.
    """
    splits = [split for split in SPLITS if any(group.curves[split] for group in groups)]
    names: List[str] = []
    for group in groups:
        names += [name for name in group.curves['eval'] or group.curves['train'] if name not in names]
    names.sort(key=lambda name: (name == 'ensemble', name == 'main', name))
    single = len(groups) == 1
    figure, axes = _figure(1 if single else len(names), len(splits), 3.6, 2.6 if single else 2.2)
    for column, split in enumerate(splits):
        for i, name in enumerate(names):
            panel = axes[0 if single else i, column]
            for j, group in enumerate(groups):
                if name in group.curves[split]:
                    _line(panel, group.curves[split][name], f'C{i if single else j}',
                          name if single else f'{group.label} (n = {len(group.folders)})')
            panel.set_title(SPLITS[split] if single else f'{name}, {SPLITS[split]}', fontsize=9)
            panel.set_xlabel('epoch', fontsize=8)
            panel.set_ylabel('top-1 (%)', fontsize=8)
            panel.tick_params(labelsize=8)
            panel.grid(alpha=.3)
    most = max((panel for row in axes for panel in row), key=lambda p: len(p.get_legend_handles_labels()[0]))
    handles, labels = most.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=5 if single else 1, fontsize=8)
    return figure


def right_wrong_figure(counts: np.ndarray, names: Sequence[str]) -> Any:
    """Fig. 2: a 2x2 table per exit of images that it and the main network get right or wrong.

    Args:
        counts: [exits, 2, 2], as `analysis.right_wrong_counts` gives them.
        names: Names of the exits.
    """
    figure, axes = _figure(1, len(counts), 2.5, 2.5)
    for panel, table, name in zip(axes[0], counts, names):
        panel.imshow(table, cmap='Blues', vmin=0, vmax=counts.sum((1, 2)).max())
        for (i, j), value in np.ndenumerate(table):
            share = 100 * value / table.sum()
            dark = value > .5 * table.sum()
            panel.text(j, i, f'{value}\n{share:.1f} %', ha='center', va='center', fontsize=9,
                       color='white' if dark else 'black')
        panel.set_xticks([0, 1], ['right', 'wrong'], fontsize=8)
        panel.set_yticks([0, 1], ['right', 'wrong'], fontsize=8, rotation=90, va='center')
        panel.set_xlabel(name, fontsize=9)
        panel.set_ylabel('main', fontsize=9)
    return figure


def dissimilarity_figure(matrices: Dict[str, np.ndarray], contrasts: Dict[str, float]) -> Any:
    """Fig. 4: dissimilarity matrices, images sorted by class; dark blocks on the diagonal are classes held together.

    Args:
        matrices: [N, N] by title.
        contrasts: `analysis.class_contrast` by the same title, where there is one.
    """
    rows = (len(matrices) + 1) // 2
    figure, axes = _figure(rows, 2, 3.4, 3.2)
    for panel in axes.flat[len(matrices):]:
        panel.set_axis_off()
    for panel, (title, matrix) in zip(axes.flat, matrices.items()):
        image = panel.imshow(matrix, cmap='viridis', vmin=0, vmax=max(1., float(np.quantile(matrix, .99))))
        contrast = f'\nclass contrast {contrasts[title]:.3f}' if title in contrasts else ''
        panel.set_title(title + contrast, fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
        figure.colorbar(image, ax=panel, shrink=.75).ax.tick_params(labelsize=7)
    return figure


def _kind_of(name: str) -> str:
    if name.startswith('early exit'):
        return 'early exit'
    return name if name == 'ensemble' else 'one exit for all images'


def trade_off_figure(rows: Sequence[TradeOff], metric: str = 'top-1') -> Any:
    """Accuracy against cost, a panel per kind of cost: one exit for all images, the ensemble, early exit.

    Args:
        rows: What to draw.
        metric: What its accuracy is called.
    """
    kinds = list(rows[0].costs)
    figure, axes = _figure(1, len(kinds), 5., 3.4)
    for panel, kind in zip(axes[0], kinds):
        for label, style in (('early exit', '.-C1'), ('ensemble', 'sC2'), ('one exit for all images', 'o--C0')):
            points = sorted((row for row in rows if _kind_of(row.name) == label), key=lambda row: row.costs[kind])
            if points:
                panel.plot([row.costs[kind] for row in points], [row.accuracy for row in points], style, label=label)
            for row in points if label != 'early exit' else ():
                panel.annotate(row.name, (row.costs[kind], row.accuracy), xytext=(4, -11), textcoords='offset points',
                               fontsize=8)
        panel.set_xlabel(kind, fontsize=9)
        panel.set_ylabel(f'{metric} (%)', fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=.3)
        panel.margins(.12)
    axes[0, 0].legend(fontsize=8)
    return figure
