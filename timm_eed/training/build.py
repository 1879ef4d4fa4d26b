"""What a run is made of, from parsed arguments: device, model, task, optimizer, schedule."""
import argparse
import importlib
import logging
import os
from contextlib import nullcontext
from typing import Any, Callable, Dict, Optional, Tuple

import timm
import torch
import torch.nn as nn
from huggingface_hub.errors import HTTPError
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.loss import create_classification_loss
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import NativeScaler, init_distributed_device, random_seed, set_jit_fuser

from ..exits import TimmModel
from ..hub_errors import why_not_loaded
from ..losses import create_multi_exit_loss
from ..multi_exit import MultiExitWrapper, check_model_name, classifier_layers, wrap
from ..task import MultiExitTask
from ..teacher import MultiExitDistillationTask, load_teacher
from .arguments import loss_kwargs
from .checkpoint import load_initial_checkpoint
from .errors import TrainingError

__all__ = [
    'Precision', 'build_model', 'build_optimizer', 'build_scheduler', 'build_task', 'make_model', 'setup_device']

_logger = logging.getLogger(__name__)


def setup_device(args: argparse.Namespace) -> torch.device:
    """Choose the device, join the process group, seed; adds distributed, rank, world_size, primary to `args`.

    On the CPU, compute leaves cores to the loader's processes (at most half); OMP_NUM_THREADS decides otherwise.
    """
    for module in args.device_modules or []:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise TrainingError(f"--device-modules: cannot import '{module}': {error}") from error
    if args.fuser:
        set_jit_fuser(args.fuser)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        _logger.warning('No GPU is available, training on the CPU (--device cpu says so without this warning).')
        args.device = 'cpu'
    try:
        device = init_distributed_device(args)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"Cannot use --device '{args.device}': {error}") from error
    args.primary = args.rank == 0
    if device.type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        # compute threads that share cores with the loader's processes wait for each other, at a tenth of the speed
        cores = os.cpu_count() or 1
        torch.set_num_threads(max(cores - args.workers, cores // 2, 1))
    if device.type == 'cuda':
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.fast_norm:
        set_fast_norm()
    args.img_dtype = getattr(torch, args.model_dtype or 'float32')
    args.mixup_active = args.mixup > 0 or args.cutmix > 0. or args.cutmix_minmax is not None
    random_seed(args.seed, args.rank)
    return device


class Precision:
    """Mixed precision of a run: the autocast context of each step, and the loss scaler float16 needs on a GPU.

    Args:
        args: Parsed arguments.
        device: Device of the run.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.scaler: Optional[NativeScaler] = None
        self._autocast: Callable[[], Any] = nullcontext
        if not args.amp:
            return
        dtype = getattr(torch, args.amp_dtype)
        if device.type == 'cpu' and dtype == torch.float16:
            _logger.warning('float16 AMP is for GPUs, using bfloat16 on the CPU (--amp-dtype bfloat16).')
            dtype = torch.bfloat16
        self._autocast = lambda: torch.autocast(device.type, dtype=dtype)
        if dtype == torch.float16:
            self.scaler = NativeScaler(device=device.type)

    def autocast(self) -> Any:
        """Context for forward passes."""
        return self._autocast()


def build_model(args: argparse.Namespace, device: torch.device) -> TimmModel:
    """The model of a run on its device, ready for training.

    Raises:
        TrainingError: If the name is unknown, an exit cannot be placed, or a checkpoint does not fit.
    """
    model = make_model(args)
    if args.initial_checkpoint:
        load_initial_checkpoint(model, args.initial_checkpoint)
    _init_heads(args, model)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if isinstance(model, MultiExitWrapper) and args.freeze_backbone:
        model.freeze_backbone()  # behind the conversion, which makes new parameters
    model.to(device=device, dtype=args.img_dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        if device.type == 'cpu':
            raise TrainingError('--sync-bn: PyTorch shares batch norm statistics on GPUs only; drop it on the CPU.')
        model = convert_sync_batchnorm(model)
    return model


def make_model(args: argparse.Namespace) -> TimmModel:
    """The model that the flags name: multi-exit, or plain timm for --eed-method none.

    Raises:
        TrainingError: If the name is unknown, or an exit cannot be placed.
    """
    try:
        check_model_name(args.model)
        model: TimmModel = timm.create_model(pretrained=args.pretrained, **_model_kwargs(args))
        return model if args.eed_method == 'none' else wrap(
            model, args.exit_indices, args.exit_type, **args.exit_kwargs)
    except (HTTPError, OSError) as error:
        raise TrainingError(f"Cannot make the model '{args.model}': {why_not_loaded(error, args.model)}") from error
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise TrainingError(f"Cannot make the model '{args.model}': {error}") from error


def _model_kwargs(args: argparse.Namespace) -> Dict[str, Any]:
    overlay = None
    if args.pretrained_path:
        overlay = dict(file=args.pretrained_path, num_classes=-1)
    kwargs = dict(
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path if args.drop_path is not None else args.drop_connect,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
    )
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)
    kwargs = resolve_model_input_args(
        args.model, vars(args), in_chans=in_chans, pretrained_cfg_overlay=overlay, **kwargs, **args.model_kwargs)
    if overlay:
        kwargs['pretrained_cfg_overlay'] = overlay
    return kwargs


def _init_heads(args: argparse.Namespace, model: TimmModel) -> None:
    with torch.no_grad():
        for name, parameter in (item for layer in classifier_layers(model) for item in layer.named_parameters()):
            if args.head_init_scale is not None:
                parameter.mul_(args.head_init_scale)
            if args.head_init_bias is not None and name.endswith('bias'):
                parameter.fill_(args.head_init_bias)


def build_task(
        args: argparse.Namespace,
        model: nn.Module,
        device: torch.device,
        data_config: Optional[Dict[str, Any]] = None,
) -> TrainingTask:
    """The training task: the loss over all exits, or timm's own for a plain model.

    Args:
        args: Parsed arguments.
        model: The model.
        device: Its device.
        data_config: Mean and std of the images, for an external teacher; the model's own when None.

    Raises:
        TrainingError: If the loss or the teacher does not fit the flags or the model.
    """
    common: Dict[str, Any] = dict(device=device, dtype=args.img_dtype, verbose=args.primary)
    weights = args.loss_class_weight
    if weights and len(weights) not in (1, model.num_classes):
        raise TrainingError(f'--loss-class-weight takes one weight, or one for each of the {model.num_classes} '
                            f'classes, not {len(weights)}.')
    try:
        if not isinstance(model, MultiExitWrapper):
            return _plain_task(args, model, common)
        loss = create_multi_exit_loss(**loss_kwargs(args), **_criterion_kwargs(args))
        if args.kd_model_name:
            teacher = load_teacher(args.kd_model_name, model, device, args.img_dtype)
            return MultiExitDistillationTask(
                model, teacher, loss, args.distill_loss_weight, args.task_loss_weight, args.kd_temperature,
                **{name: data_config[name] for name in ('mean', 'std') if data_config}, **common)
        return MultiExitTask(model, loss, threshold=args.multilabel_threshold, **common)
    except (HTTPError, OSError) as error:
        raise TrainingError(f'--kd-model-name: {why_not_loaded(error, args.kd_model_name)}') from error
    except (ValueError, RuntimeError) as error:
        raise TrainingError(str(error)) from error


def _criterion_kwargs(args: argparse.Namespace) -> Dict[str, Any]:
    """What the flags say about the loss of each classifier, as arguments of timm's `create_classification_loss`."""
    loss = args.loss or ('jsd' if args.jsd_loss else 'bce' if args.bce_loss else None)
    return dict(
        loss_type=loss,
        multi_label=args.task == 'multilabel',
        smoothing=args.smoothing,
        soft_targets=args.mixup_active,
        class_weight=args.loss_class_weight,
        pos_weight=args.loss_pos_weight if args.bce_pos_weight is None else args.bce_pos_weight,
        bce_sum=args.bce_sum,
        bce_target_thresh=args.bce_target_thresh,
        asl_gamma_pos=args.asl_gamma_pos,
        asl_gamma_neg=args.asl_gamma_neg,
        asl_clip=args.asl_clip,
        asl_reduction=args.asl_reduction,
        poly_epsilon=args.poly_epsilon,
        poly_gamma=args.poly_gamma,
        poly_alpha=args.poly_alpha,
        jsd_splits=args.aug_splits,
        twoway_tp=args.twoway_tp,
        twoway_tn=args.twoway_tn,
    )


def _plain_task(args: argparse.Namespace, model: nn.Module, common: Dict[str, Any]) -> TrainingTask:
    """timm's task for a model without exits."""
    common = {**common, 'criterion': create_classification_loss(**_criterion_kwargs(args))}
    if args.task == 'multilabel':
        return MultiLabelClassificationTask(model, threshold=args.multilabel_threshold, **common)
    if not args.kd_model_name:
        return ClassificationTask(model, **common)
    weights = dict(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    if args.kd_distill_type == 'feature':
        return FeatureDistillationTask(
            model, args.kd_model_name, student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim, **weights, **common)
    teacher = load_teacher(args.kd_model_name, model, common['device'], common['dtype'])
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(
            model, teacher, distill_type=args.kd_token_distill_type, temperature=args.kd_temperature,
            **weights, **common)
    return LogitDistillationTask(
        model, teacher, loss_type=args.kd_loss_type, temperature=args.kd_temperature, **weights, **common)


def build_optimizer(args: argparse.Namespace, task: TrainingTask) -> torch.optim.Optimizer:
    """timm's optimizer over all that the task trains, which may be more than the model.

    Fills in `args.lr` from the global batch where it is not given.
    """
    if args.lr is None:
        batch = args.batch_size * args.world_size * args.grad_accum_steps
        scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
        ratio = batch / args.lr_base_size
        args.lr = args.lr_base * (ratio ** .5 if scale == 'sqrt' else ratio)
        if args.primary:
            _logger.info(
                f'Learning rate {args.lr:.4g} from --lr-base {args.lr_base} and a global batch of {batch} ({scale}).')
    module: Any = task.get_trainable_module()
    try:
        return create_optimizer_v2(module, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (ValueError, TypeError) as error:
        raise TrainingError(f"Cannot make the optimizer '{args.opt}': {error}") from error


def build_scheduler(
        args: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        updates_per_epoch: int,
) -> Tuple[Optional[Any], int]:
    """timm's schedule and the number of epochs it makes of --epochs (cooldown, cycles)."""
    try:
        return create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric='loss' in args.eval_metric),
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise TrainingError(f"Cannot make the schedule '{args.sched}': {error}") from error
