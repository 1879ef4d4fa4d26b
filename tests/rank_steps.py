"""What one process of a job computes; test_distributed.py holds it against a single process.

Under torchrun: every process writes its results to WORLD-RANK.pt in the folder that is named, and goes through runs of
train_eed.py whose arguments follow as JSON.
"""
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.utils import unwrap_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.nn.functional import all_reduce

import train_eed
from timm_eed.training.arguments import parse_args
from timm_eed.training.build import Precision, build_model, build_task, setup_device
from timm_eed.training.checkpoint import Start
from timm_eed.training.data import Data, create_data
from timm_eed.training.distributed import check_processes_agree, share_batch_norm
from timm_eed.training.engine import evaluate, train_one_epoch
from timm_eed.training.errors import TrainingError

BATCH, CLASSES = 8, 3
# layer norm: no sample knows of another; batch norm: statistics over all processes
STATISTICS = '--dist-bn reduce', '--dist-bn broadcast', '--dist-bn=', '--dist-bn= --no-ddp-bb', '--freeze-backbone'
MODELS = {'layer': ('test_vit', 'linear'), 'batch': ('test_resnet', 'conv')}


def arguments(norm: str, *flags: str) -> Namespace:
    model, exit_type = MODELS[norm]
    return parse_args([
        '--model', model, '--exit-type', exit_type, '--img-size', '32', '--num-classes', str(CLASSES), '--eed-beta',
        '1', '-j', '0', '--device', 'cpu', *flags])


def synchronized_forward(self: torch.nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Batch norm over all processes from its definition (PyTorch's own runs on GPUs only)."""
    if not self.training:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
    wide = x.double()
    moments = torch.stack([wide.mean((0, 2, 3)), wide.square().mean((0, 2, 3))])
    mean, square = all_reduce(moments) / dist.get_world_size()
    var = square - mean.square()
    count = x.numel() // x.shape[1] * dist.get_world_size()
    with torch.no_grad():
        self.running_mean.lerp_(mean.float(), self.momentum)
        self.running_var.lerp_((var * count / (count - 1)).float(), self.momentum)
    mean, scale, bias = (v[:, None, None] for v in (mean, self.weight * (var + self.eps).rsqrt(), self.bias))
    return ((wide - mean) * scale + bias).float()


def make_task(args: Namespace, device: torch.device) -> Any:
    model = build_model(args, device)
    if args.distributed and 'resnet' in args.model:
        model = convert_sync_batchnorm(model)
        torch.nn.SyncBatchNorm.forward = synchronized_forward  # type: ignore[method-assign]
        torch.nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # asks for GPUs
    task = build_task(args, model, device)
    if args.distributed:
        task.prepare_distributed()
    return task


def batches(args: Namespace, number: int) -> List[Any]:
    """This process's share of `number` batches for the whole job, the same ones for any number of processes."""
    generator = torch.Generator().manual_seed(0)
    share = slice(args.rank * BATCH // args.world_size, (args.rank + 1) * BATCH // args.world_size)
    return [
        (torch.randn(BATCH, 3, args.img_size, args.img_size, generator=generator)[share],
         torch.randint(CLASSES, (BATCH,), generator=generator)[share])
        for _ in range(number)]


def one_step(norm: str) -> Dict[str, torch.Tensor]:
    """Gradients and batch norm statistics of a step."""
    args = arguments(norm)
    device = setup_device(args)
    task = make_task(args, device).train()
    task(*batches(args, 1)[0])['loss'].backward()
    model = unwrap_model(task.get_trainable_module())
    gradients = {f'grad {name}': p.grad for name, p in model.named_parameters()}
    return {**gradients, **{name: b for name, b in model.named_buffers() if 'running' in name}}


class Batches(list):
    """A loader that notes how many gradients were exchanged when it was asked for each batch."""
    dataset, exchanged, counts = (), 0, ()

    def __iter__(self):
        for batch in list.__iter__(self):
            self.counts = (*self.counts, self.exchanged)
            yield batch


def accumulated(steps: int) -> Dict[str, Any]:
    """Weights after three batches, `steps` per update, and the exchanges seen before each batch."""
    args = arguments('layer', '--grad-accum-steps', str(steps), '--lr', '.1')
    device = setup_device(args)
    task = make_task(args, device)
    loader = Batches(batches(args, 3))
    if args.distributed:
        def count(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            loader.exchanged += 1
            return allreduce_hook(state, bucket)
        task.trainable_module.register_comm_hook(None, count)
    else:  # the oracle: batches made large instead
        pairs = [loader[i:i + steps] for i in range(0, len(loader), steps)]
        loader = Batches([tuple(map(torch.cat, zip(*pair))) for pair in pairs])
        args.grad_accum_steps = 1
    optimizer = torch.optim.SGD(task.parameters(), lr=.1, momentum=.9)
    train_one_epoch(
        0, task, Data(loader, None, None, None, []), optimizer, args, Precision(args, device))
    weights = {name: p.detach() for name, p in unwrap_model(task.get_trainable_module()).named_parameters()}
    return dict(weights=weights, exchanged=(*loader.counts, loader.exchanged))


def metrics(images: str) -> Dict[str, float]:
    """Evaluation of fresh weights on a folder."""
    args = arguments('batch', '--data', images, '-b', '3')
    device = setup_device(args)
    task = make_task(args, device)
    config = resolve_data_config(vars(args), model=unwrap_model(task.trainable_module))
    data = create_data(args, config, CLASSES, device)
    return evaluate(task.get_eval_model(), task, data.validation, args, Precision(args, device))


def shared_statistics(*flags: str) -> Dict[str, torch.Tensor]:
    """Running means of the backbone and of an exit that were the rank + 1, after `share_batch_norm`."""
    args = arguments('batch', *flags)
    device = setup_device(args)
    task = make_task(args, device)
    model = unwrap_model(task.get_trainable_module())
    means = {name: b for name, b in model.named_buffers() if name.endswith('running_mean')}
    for mean in means.values():
        mean.fill_(args.rank + 1)
    share_batch_norm(args, task)
    return means


def disagreement(**differs: int) -> str:
    """What is said where the processes have unequal numbers of images, or epochs done."""
    args = arguments('batch')
    setup_device(args)
    data = Data(SimpleNamespace(dataset=range(10 - args.rank * differs.get('images', 0))), None, None, None, [])
    try:
        check_processes_agree(args, data, Start(args.rank * differs.get('epochs', 0)))
    except TrainingError as error:
        return str(error)
    return ''


def main(folder: Path, images: str) -> None:
    results: Dict[str, Any] = {f'step {norm}': one_step(norm) for norm in MODELS}
    results['accumulated'] = accumulated(2)
    results['metrics'] = metrics(images)
    for flags in STATISTICS:
        results[flags] = shared_statistics(*flags.split())
    results['disagreement'] = [disagreement(), disagreement(images=1), disagreement(epochs=2)]
    torch.save(results, folder / f'{dist.get_world_size()}-{dist.get_rank()}.pt')


if __name__ == '__main__':
    dist.init_process_group('gloo')
    # a launcher gives a job one process group; here it serves several
    with mock.patch.object(dist, 'init_process_group'), mock.patch.object(dist, 'destroy_process_group'):
        main(Path(sys.argv[1]), sys.argv[2])
        for command in json.loads(sys.argv[3]):
            train_eed.main(command)
            dist.barrier()  # the next run may read what the first process wrote
    dist.destroy_process_group()
