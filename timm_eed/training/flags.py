"""The flags of train_eed.py, a group per topic; names, types, defaults, meanings are those of timm's script."""
import argparse
from typing import Any, Callable, Optional

from timm.loss import LOSS_TYPES
from timm.utils import ParseKwargs

from ..exits import EXIT_TYPES

__all__ = ['add_exit_arguments', 'build_parser', 'config_parser']


def config_parser() -> argparse.ArgumentParser:
    """The one flag that is read before all others."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file of flags (flags given here win)')
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something; None, False and empty ones are described by the help itself."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        return super()._get_help_string(action) if action.default else action.help


def build_parser() -> argparse.ArgumentParser:
    """The parser, a group per topic; names, types, defaults and meanings are those of timm's train script."""
    parser = argparse.ArgumentParser(
        usage='%(prog)s [DIR] [-c FILE] [--flag VALUE ...]',
        description='Train a timm model with exits by exit-ensemble distillation.',
        parents=[config_parser()],
        formatter_class=_HelpFormatter,
    )
    for add_group in (
            _exits, _data, _model, _device, _optimizer, _schedule, _augmentation, _sizes, _regularization, _loss,
            _teacher, _batch_norm, _ema, _output, _naflex):
        add_group(parser)
    return parser


def add_exit_arguments(add: Callable[..., Any]) -> None:
    """Flags that say which exits a model gets.

    Args:
        add: `add_argument` of a parser or group.
    """
    add('--exit-indices', type=int, nargs='+', metavar='N',
        help='feature stages to put exits behind (timm out_indices); default: every stage boundary, at most three')
    add('--exit-type', default='conv', choices=EXIT_TYPES, help='kind of exit head')
    add('--exit-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V',
        help='arguments for the exits: drop_rate, last_stride')


def _exits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Exits and exit-ensemble distillation').add_argument
    add('--eed-method', default='eed', choices=['eed', 'kd', 'ce', 'none'],
        help='loss over the exits, by equations of the paper: eed (8, the ensemble teaches), kd (4, the main network '
             'teaches), ce (2, labels alone); none: no exits, plain timm')
    add('--eed-alpha', type=float, default=1., metavar='F', help='weight of the output distillation')
    add('--eed-beta', type=float, default=0., metavar='F', help='weight of the feature distillation')
    add('--eed-output-loss', default='kl', choices=['kl', 'mse'], help='output distillation loss')
    add('--eed-temperature', type=float, default=3., metavar='F', help='temperature of the KL')
    add('--eed-teacher', default='ensemble', metavar='WHO', help='ensemble, main, or members as in exit1+exit3+main')
    add_exit_arguments(add)
    add('--freeze-backbone', action='store_true', help='train the exits alone')
    add('--push-to-hub', default='', metavar='USER/NAME',
        help='publish the last checkpoint on the Hugging Face Hub at the end (its moving average if there is one)')


def _data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Data').add_argument
    add('data', nargs='?', metavar='DIR', help='data folder')
    add('--data-dir', '--data', dest='data_dir', metavar='DIR', help='data folder (same as the positional)')
    add('--dataset', default='', metavar='NAME',
        help='type/name of a data set (torch/cifar100, hfds/.., wds/.., eed/digits); folder of images if empty')
    add('--train-split', default='train', metavar='NAME', help='training split')
    add('--val-split', default='validation', metavar='NAME', help="validation split; '' trains without one")
    add('--train-num-samples', type=int, metavar='N', help='training samples of a streamed data set')
    add('--val-num-samples', type=int, metavar='N', help='validation samples of a streamed data set')
    add('--dataset-download', action='store_true', help='download data sets that support it')
    add('--class-map', default='', metavar='FILE', help='class name to index map')
    add('--input-img-mode', metavar='MODE', help='PIL mode images are converted to (RGB, or L for one channel)')
    add('--input-key', metavar='KEY', help='data set key of images')
    add('--target-key', metavar='KEY', help='data set key of targets; several binary ones as in a,b,c')
    add('--target-format', metavar='NAME', help='how targets are stored: indices, or multihot vectors')
    add('--dataset-trust-remote-code', action='store_true', help='let a Hugging Face data set run its own code')
    add('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes')
    add('--pin-mem', action='store_true', help='pin CPU memory for faster transfer to the GPU')
    add('--no-prefetcher', action='store_true', help='no fast prefetcher')
    add('--use-multi-epochs-loader', action='store_true', help='keep loader workers between epochs')
    add('--worker-seeding', default='all', choices=['all', 'part'], help='how loader workers are seeded')


def _model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Model').add_argument
    add('--model', default='resnet50', metavar='NAME', help='timm model')
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--pretrained-path', metavar='FILE', help='load pretrained weights from this file')
    add('--initial-checkpoint', default='', metavar='FILE',
        help='start from this checkpoint, of a plain or of a multi-exit model')
    add('--num-classes', type=int, metavar='N', help="number of classes; the model's own if not given")
    add('--gp', metavar='POOL', help='global pooling: fast, avg, max, avgmax, avgmaxc')
    add('--img-size', type=int, metavar='N', help='image size, height and width')
    add('--in-chans', type=int, metavar='N', help='image channels')
    add('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'), help='image size, all three')
    add('--crop-pct', type=float, metavar='F', help='centre crop share in validation')
    add('--mean', type=float, nargs='+', metavar='F', help='channel means of the data')
    add('--std', type=float, nargs='+', metavar='F', help='channel standard deviations of the data')
    add('--interpolation', default='', metavar='NAME', help='resize interpolation')
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='training batch per process')
    add('-vb', '--validation-batch-size', type=int, metavar='N', help='validation batch; as in training if not given')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per optimizer step')
    add('--grad-checkpointing', action='store_true', help='trade compute for memory in the backbone')
    add('--fast-norm', action='store_true', help='faster norm layers under AMP')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='arguments for the model')
    add('--head-init-scale', type=float, metavar='F', help='factor on the initial weights of all classifiers')
    add('--torchscript', action='store_true', help='convert the model to TorchScript (plain models alone)')
    add('--fuser', default='', metavar='NAME', help='TorchScript fuser: te, old, nvfuser')
    add('--head-init-bias', type=float, metavar='F', help='initial bias of all classifiers')


def _device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Device and precision').add_argument
    add('--device', default='cuda', help='device; falls back to the CPU where there is no GPU')
    add('--amp', action='store_true', help='automatic mixed precision')
    add('--amp-dtype', default='float16', choices=['float16', 'bfloat16'], help='dtype of AMP')
    add('--model-dtype', choices=['float32', 'float16', 'bfloat16'], help='dtype of the model itself, without AMP')
    add('--channels-last', action='store_true', help='channels last memory layout')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    add('--torchcompile-mode', metavar='MODE', help='torch.compile mode')
    add('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import for device backends')
    add('--no-ddp-bb', action='store_true', help='no broadcast of buffers in DDP')
    add('--synchronize-step', action='store_true', help='wait for the device at the end of each step')
    add('--local_rank', type=int, default=0, help='set by launchers')


def _optimizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Optimizer').add_argument
    add('--opt', default='sgd', metavar='NAME', help='optimizer')
    add('--opt-eps', type=float, metavar='F', help="epsilon; the optimizer's own if not given")
    add('--opt-betas', type=float, nargs='+', metavar='F', help="betas; the optimizer's own if not given")
    add('--momentum', type=float, default=.9, metavar='F', help='momentum')
    add('--weight-decay', type=float, default=2e-5, metavar='F', help='weight decay')
    add('--clip-grad', type=float, metavar='F', help='gradient clipping; none if not given')
    add('--clip-mode', default='norm', choices=['norm', 'value', 'agc'], help='what is clipped')
    add('--layer-decay', type=float, metavar='F', help='layer-wise learning rate decay (exits count as head)')
    add('--layer-decay-min-scale', type=float, default=0, metavar='F', help='least scale of layer decay')
    add('--layer-decay-no-opt-scale', type=float, metavar='F', help='layers scaled below this are not trained')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='arguments for the optimizer')


def _schedule(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Learning rate schedule').add_argument
    add('--sched', default='cosine', metavar='NAME', help='cosine, tanh, step, multistep, poly, wsd, none, ..')
    add('--sched-on-updates', action='store_true', help='schedule by updates, not by epochs')
    add('--lr', type=float, metavar='F', help='learning rate; from --lr-base if not given')
    add('--lr-base', type=float, default=.1, metavar='F', help='learning rate for a batch of --lr-base-size')
    add('--lr-base-size', type=int, default=256, metavar='N', help='batch size that --lr-base is for')
    add('--lr-base-scale', default='', choices=['', 'linear', 'sqrt'],
        help='how lr grows with the batch; by optimizer if empty')
    add('--lr-noise', type=float, nargs='+', metavar='F', help='epochs (shares of all) with noise on the lr')
    add('--lr-noise-pct', type=float, default=.67, metavar='F', help='limit of the noise')
    add('--lr-noise-std', type=float, default=1., metavar='F', help='standard deviation of the noise')
    add('--lr-cycle-mul', type=float, default=1., metavar='F', help='growth of cycle lengths')
    add('--lr-cycle-decay', type=float, default=.5, metavar='F', help='decay of the lr per cycle')
    add('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    add('--lr-k-decay', type=float, default=1., metavar='F', help='k of cosine and poly')
    add('--lr-decay-fn', metavar='NAME', help='shape of the decay phase (wsd)')
    add('--lr-stable-timescale', type=float, metavar='F', help='timescale of the stable phase (rsqrt)')
    add('--warmup-lr', type=float, default=1e-5, metavar='F', help='lr at the start of the warm-up')
    add('--min-lr', type=float, default=0, metavar='F', help='least lr')
    add('--epochs', type=int, default=300, metavar='N', help='number of epochs')
    add('--stop-epoch', type=int, metavar='N', help='stop after N epochs, the schedule being that of --epochs')
    add('--epoch-repeats', type=float, default=0., metavar='F', help='repeats of a streamed data set per epoch')
    add('--start-epoch', type=int, metavar='N', help='epoch to start from, for resumed runs')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N', help='epochs (multistep)')
    add('--decay-epochs', type=float, default=90, metavar='F', help='epochs between decays (step), of decay (wsd)')
    add('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up')
    add('--warmup-prefix', action='store_true', help='the warm-up is not part of --epochs')
    add('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at the least lr at the end')
    add('--patience-epochs', type=int, default=10, metavar='N', help='patience (plateau)')
    add('--decay-rate', '--dr', type=float, default=.1, metavar='F', help='factor per decay')


def _augmentation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Augmentation').add_argument
    add('--no-aug', action='store_true', help='no training augmentation')
    add('--train-crop-mode', metavar='MODE', help='training crop: rrc, rkrc, rkrr')
    add('--crop-padding', type=int, metavar='N',
        help='instead of resized crops: crops of the input size from the image with N black pixels around (CIFAR: 4)')
    add('--scale', type=float, nargs='+', default=[.08, 1.], metavar='F', help='area of random resized crops')
    add('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.], metavar='F', help='aspect of random crops')
    add('--hflip', type=float, default=.5, metavar='P', help='horizontal flip')
    add('--vflip', type=float, default=0., metavar='P', help='vertical flip')
    add('--color-jitter', type=float, default=.4, metavar='F', help='colour jitter')
    add('--color-jitter-prob', type=float, metavar='P', help='probability of colour jitter; always if not given')
    add('--grayscale-prob', type=float, metavar='P', help='random greyscale')
    add('--gaussian-blur-prob', type=float, metavar='P', help='random blur')
    add('--aa', metavar='POLICY', help='AutoAugment, RandAugment or AugMix policy, as in rand-m9-mstd0.5')
    add('--aug-repeats', type=float, default=0, metavar='N', help='repeated augmentation (distributed only)')
    add('--aug-splits', type=int, default=0, metavar='N', help='augmentation splits, 0 or at least 2')
    add('--reprob', type=float, default=0., metavar='P', help='random erasing')
    add('--remode', default='pixel', choices=['pixel', 'rand', 'const'], help='random erasing mode')
    add('--recount', type=int, default=1, metavar='N', help='random erasing regions')
    add('--resplit', action='store_true', help='no random erasing in the first augmentation split')
    add('--mixup', type=float, default=0., metavar='F', help='mixup alpha')
    add('--cutmix', type=float, default=0., metavar='F', help='cutmix alpha')
    add('--cutmix-minmax', type=float, nargs='+', metavar='F', help='cutmix size range, instead of alpha')
    add('--mixup-prob', type=float, default=1., metavar='P', help='probability of mixup or cutmix')
    add('--mixup-switch-prob', type=float, default=.5, metavar='P', help='probability of cutmix where both are on')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'], help='what mixup draws for')
    add('--mixup-off-epoch', type=int, default=0, metavar='N', help='epoch from which mixup is off; 0: never')
    add('--train-interpolation', default='random', metavar='NAME', help='training interpolation')


def _sizes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Training at several image sizes').add_argument
    add('--train-img-sizes', type=int, nargs='+', metavar='N', help='sizes that batches are drawn at')
    add('--train-batch-sizes', type=int, nargs='+', metavar='N', help='batch size of each; --batch-size if not given')
    add('--train-size-probs', type=float, nargs='+', metavar='P', help='weight of each size; equal if not given')
    add('--train-size-schedule', default='constant', choices=['constant', 'progressive'],
        help='same weights in every epoch, or from the first size to the last')
    add('--train-size-schedule-spread', type=float, default=.65, metavar='F', help='width of the progressive window')
    add('--train-size-random-mix', type=float, default=.1, metavar='P', help='share of random sizes beside the window')
    add('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N', help='batches per epoch')
    add('--variable-batch-loss-scale', default='none', choices=['none', 'sqrt', 'linear'],
        help='scale of the loss with the size of the batch relative to --batch-size')


def _regularization(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Regularization').add_argument
    add('--drop', type=float, default=0., metavar='P', help='dropout before the classifiers')
    add('--drop-connect', type=float, metavar='P', help='older name of --drop-path')
    add('--drop-path', type=float, metavar='P', help='stochastic depth')
    add('--drop-block', type=float, metavar='P', help='drop block')


def _loss(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Task and task loss of each classifier').add_argument
    add('--task', default='classification', choices=['classification', 'multilabel'], help='kind of targets')
    add('--multilabel-threshold', type=float, default=.5, metavar='P', help='probability that counts as yes, for F1')
    add('--loss', choices=list(LOSS_TYPES), help='criterion; ce if not given, bce for multilabel')
    add('--loss-class-weight', type=float, nargs='+', metavar='F', help='weight of the classes, one or all (bce, asl)')
    add('--loss-pos-weight', type=float, nargs='+', metavar='F', help='weight of positives, one or all (bce, asl)')
    add('--smoothing', type=float, default=.1, metavar='F', help='label smoothing')
    add('--jsd-loss', action='store_true', help='older spelling of --loss jsd')
    add('--bce-loss', action='store_true', help='older spelling of --loss bce')
    add('--bce-sum', action='store_true', help='sum bce over classes')
    add('--bce-target-thresh', type=float, metavar='F', help='threshold that makes soft bce targets hard')
    add('--bce-pos-weight', type=float, metavar='F', help='weight of positives in bce')
    add('--asl-gamma-pos', type=float, default=1., metavar='F', help='focus on positives (asl)')
    add('--asl-gamma-neg', type=float, default=4., metavar='F', help='focus on negatives (asl)')
    add('--asl-clip', type=float, default=.05, metavar='F', help='margin on negatives (multilabel asl)')
    add('--asl-reduction', default='batchmean', choices=['batchmean', 'sum', 'mean'], help='reduction (multilabel asl)')
    add('--poly-epsilon', type=float, default=2., metavar='F', help='epsilon of poly')
    add('--poly-gamma', type=float, default=0., metavar='F', help='focus of poly (multilabel)')
    add('--poly-alpha', type=float, metavar='F', help='balance of positives and negatives of poly (multilabel)')
    add('--twoway-tp', type=float, default=4., metavar='F', help='temperature of positives (twoway)')
    add('--twoway-tn', type=float, default=1., metavar='F', help='temperature of negatives (twoway)')


def _teacher(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('External teacher').add_argument
    add('--kd-model-name', metavar='NAME', help='pretrained timm model that teaches every classifier, beside the rest')
    add('--kd-distill-type', default='logit', choices=['logit', 'feature', 'token'],
        help='what is distilled; with exits logits alone')
    add('--kd-loss-type', default='kl', metavar='NAME', help='loss on logits: kl')
    add('--distill-loss-weight', type=float, metavar='F', help='weight of the teacher; 1 if neither weight is given')
    add('--task-loss-weight', type=float, metavar='F', help='weight of the rest; alone it makes the other 1 - F')
    add('--kd-temperature', type=float, default=4., metavar='F', help='temperature of the teacher')
    add('--kd-student-feature-dim', type=int, metavar='N', help='feature width of the student (feature)')
    add('--kd-teacher-feature-dim', type=int, metavar='N', help='feature width of the teacher (feature)')
    add('--kd-token-distill-type', default='soft', choices=['soft', 'hard'], help='kind of token distillation')


def _batch_norm(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Batch norm').add_argument
    add('--bn-momentum', type=float, metavar='F', help='batch norm momentum')
    add('--bn-eps', type=float, metavar='F', help='batch norm epsilon')
    add('--sync-bn', action='store_true', help='statistics over all processes')
    add('--dist-bn', default='reduce', choices=['broadcast', 'reduce', ''],
        help='how processes agree on statistics after an epoch')
    add('--split-bn', action='store_true', help='statistics per augmentation split')


def _ema(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Moving average of the weights').add_argument
    add('--model-ema', action='store_true', help='keep and evaluate a moving average')
    add('--model-ema-force-cpu', action='store_true', help='keep it on the CPU (then it is not evaluated)')
    add('--model-ema-decay', type=float, default=.9998, metavar='F', help='decay')
    add('--model-ema-warmup', action='store_true', help='warm the decay up')


def _output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('Run, checkpoints and logging').add_argument
    add('--seed', type=int, default=42, metavar='N', help='random seed')
    add('--output', default='', metavar='DIR', help='folder of all runs; ./output/train if empty')
    add('--experiment', default='', metavar='NAME', help='name of the run; date, model and size if empty')
    add('--resume', default='', metavar='FILE', help='continue from a checkpoint, or auto: the last of --experiment')
    add('--no-resume-opt', action='store_true', help='do not restore the optimizer')
    add('--eval-metric', default='top1', metavar='NAME', help='ranks checkpoints: top1, top1_exit1, loss, ..')
    add('--log-interval', type=int, default=50, metavar='N', help='steps between log lines')
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between evaluations')
    add('--recovery-interval', type=int, default=0, metavar='N', help='steps between recovery checkpoints; 0: none')
    add('--save-epochs', type=int, nargs='+', metavar='N', help='keep milestone-N.pth.tar after N epochs')
    add('--save-images', action='store_true', help='save the training batches of log steps as images')
    add('--tta', type=int, default=0, metavar='N', help="not supported: timm's loader makes no augmented copies")
    add('--checkpoint-hist', type=int, default=10, metavar='N', help='best checkpoints kept')
    add('--log-wandb', action='store_true', help='log to Weights & Biases')
    add('--wandb-project', metavar='NAME', help='its project')
    add('--wandb-tags', nargs='+', default=[], metavar='TAG', help='its tags')
    add('--wandb-resume-id', default='', metavar='ID', help='its run to continue')


def _naflex(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('NaFlex loader (not supported: its patches have no maps for exits)').add_argument
    add('--naflex-loader', action='store_true', help='variable sequence lengths')
    add('--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024], metavar='N', help='lengths')
    add('--naflex-max-seq-len', type=int, default=576, metavar='N', help='length in validation')
    add('--naflex-patch-sizes', type=int, nargs='+', metavar='N', help='patch sizes')
    add('--naflex-patch-size-probs', type=float, nargs='+', metavar='P', help='their weights')
    add('--naflex-loss-scale', default='linear', choices=['none', 'sqrt', 'linear'], help='scale of the loss')
    add('--naflex-patchify-channels-first', action='store_true', help='layout of patches')
