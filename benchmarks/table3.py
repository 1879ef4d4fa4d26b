"""GFLOPs up to each output, ours beside Table III of 'Exit-Ensemble Distillation' (32x32 images, 100 classes).

    python benchmarks/table3.py

The paper's convention: 2 multiply-adds per element of batch norm counted with those of convolutions and linear layers,
rounded to two decimals of 10^9, then doubled. Nothing is trained or computed; it takes seconds.
"""
from typing import List, Tuple

import timm_eed

PAPER = {
    'cifar_vgg19': (.14, .24, .50, .80),
    'cifar_resnet18': (.42, .66, .88, 1.12),
    'cifar_resnet50': (.78, 1.42, 2.68, 2.60),
    'cifar_resnet101': (.78, 1.42, 5.12, 5.04),
}


def table3(name: str) -> Tuple[List[float], List[float]]:
    """GFLOPs under the paper's convention, and 10^9 multiply-adds without normalisation, of each output."""
    # the paper's VGG19 keeps a 4x4 map in the last convolution of each exit
    model = timm_eed.wrap(timm_eed.create_model(name).unwrap(), last_stride=1 if name == 'cifar_vgg19' else 2)
    printed = [2 * round(row.gmacs, 2) for row in timm_eed.profile(model, norms=True)]
    return printed, [row.gmacs for row in timm_eed.profile(model)]


def main() -> None:
    """Print the table."""
    same = 0
    print(f"{'network':<16} {'output':<6} {'paper':>7} {'ours':>7}        multiply-adds (10^9), no norms")
    for name, paper in PAPER.items():
        ours, macs = table3(name)
        for output, theirs, mine, exact in zip(('exit1', 'exit2', 'exit3', 'main'), paper, ours, macs):
            equal = f'{mine:.2f}' == f'{theirs:.2f}'
            same += equal
            print(f"{name:<16} {output:<6} {theirs:7.2f} {mine:7.2f}  {'equal ' if equal else 'DIFFERS'} {exact:9.4f}")
    print(f'{same} of 16 equal the print.')


if __name__ == '__main__':
    main()
