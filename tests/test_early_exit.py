"""Early exit: the answers are those of the full model, whoever leaves where, in every way of leaving."""
import copy
import gc
import pickle
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import ThirdPartyNet, quickest_of_each_family
from test_multi_exit import randomise

import timm_eed
from timm_eed import row_dropping
from timm_eed.cuts import take_rows
from timm_eed.early_exit import EarlyExit
from timm_eed.policies import POLICIES, ExitRule, Progress, choose_exits
from timm_eed.probe import input_size

SMALL = ['test_resnet', 'test_vit', 'test_convnext', 'test_mambaout']
WAYS = ['cut', 'replay', 'whole']
FAMILIES = [pytest.param(row, id=row['name'], marks=[pytest.mark.slow] * (float(row['seconds']) > 1.5))
            for row in quickest_of_each_family().values()]


def make(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    model = timm_eed.create_model(name, num_classes=5, **kwargs).eval()
    randomise(model)
    return model


def images(count, model, side=None):
    size = (3, side, side) if side else input_size(model.backbone)
    generator = torch.Generator().manual_seed(1)
    contrast = torch.rand(count, 1, 1, 1, generator=generator) + .5
    return torch.randn(count, *size, generator=generator) * contrast


def settle(model, x):
    """Statistics of these images for the batch norms: otherwise untrained networks tell no two images apart."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
    with torch.no_grad():
        model.train().forward_exits(x)
    model.eval()


def forced(model, way, x):
    """An EarlyExit of which the way is given, not found."""
    early = EarlyExit(model)
    if way == 'cut':
        assert early.prepare(x).name == 'cut'
    elif way == 'replay':
        with torch.no_grad():
            rows = row_dropping.find_rows(model.backbone, model.exit_indices, torch.cat([x[:1]] * 5))
        early._ways[tuple(x.shape[1:])] = row_dropping.Way('replay', rows=rows)
    else:
        early._ways[tuple(x.shape[1:])] = row_dropping.Way('whole')
    return early


def rule_between(logits, **kwargs):
    """A rule by which some samples leave at each exit, in whose thresholds no score lies near.

    Thresholds are in the widest gap of the middle half of the scores present; temperatures spread those of untrained
    networks.
    """
    temperatures = [float((z - z.mean(0)).abs().max()) / 2 + 1e-6 for z in logits]
    rule = ExitRule(len(logits), 1., temperatures=temperatures, **kwargs)
    present = torch.ones(len(logits[0]), dtype=torch.bool)
    progress = Progress()
    for i, z in enumerate(logits[:-1]):
        score = rule.answer(i, z, progress)[1].double()
        ranked = score[present].sort().values
        if len(ranked) < 3:
            continue
        quarter = len(ranked) // 4
        gaps = ranked.diff()[quarter:len(ranked) - 1 - quarter]
        at = quarter + int(gaps.argmax())
        rule.thresholds[i] = float(ranked[at] + ranked[at + 1]) / 2
        present &= ~rule.leaves(i, score)
    return rule


def assert_same(out, expected, logits, tolerance=1e-5):
    """The same exits, and answers within a tolerance of the scale that the exit's logits have on all samples."""
    assert torch.equal(out.exit_index, expected.exit_index)
    scales = torch.stack([z.abs().max() for z in logits])[out.exit_index]
    assert ((out.logits - expected.logits).abs().amax(1) <= tolerance * scales).all()
    assert torch.allclose(out.confidence, expected.confidence, atol=1e-3)


def rounding(model, x, rows, logits):
    """What the whole model's logits differ by when it gets a part of the images: kernels round otherwise."""
    with torch.no_grad():
        parts = model.forward_exits(x[rows]).logits
    return max(float((part - z[rows]).abs().max() / z.abs().max()) for part, z in zip(parts, logits))


def some_of(output, rows):
    return timm_eed.EarlyExitOutput(*(t[rows] for t in output))


def check(early, x, batches, **rule_kwargs):
    """Batches in any order against finished logits of all exits; some samples leave, some stay.

    Answers are within 1e-5, or twice what the whole model differs by on that batch (some networks amplify rounding).
    """
    with torch.no_grad():
        logits = early.model.forward_exits(x).logits
    early.rule = rule_between(logits, **rule_kwargs)
    expected = choose_exits(early.rule, logits)
    assert len(expected.exit_index.unique()) > 1
    generator = torch.Generator().manual_seed(2)
    for batch in batches:
        order = torch.randperm(len(x), generator=generator)[:batch]
        tolerance = max(1e-5, 2 * rounding(early.model, x, order, logits))
        assert_same(early(x[order]), some_of(expected, order), logits, tolerance)


@pytest.mark.parametrize('row', FAMILIES)
def test_one_model_per_family(row):
    torch.manual_seed(0)
    model = timm_eed.create_model(row['name'], num_classes=5, exit_type='linear').eval()
    randomise(model)
    x = images(7, model, int(row['input'].split('x')[-1]))
    settle(model, x)
    early = EarlyExit(model)
    assert early.prepare(x).name in ('cut', 'replay')
    check(early, x, (7, 1, 2))


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', [*SMALL, 'test_efficientnet'])
def test_ways_and_batches(name, way):
    model = make(name)
    x = images(32, model, None if name == 'test_vit' else 64)
    check(forced(model, way, x), x, (1, 2, 7, 32))


def test_a_model_that_timm_does_not_know():
    model = timm_eed.wrap(ThirdPartyNet())
    check(EarlyExit(model), torch.randn(9, 3, 16, 24), (1, 2, 7, 9))


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('ensemble', [False, True])
@pytest.mark.parametrize('way', WAYS)
def test_policies(policy, ensemble, way):
    model = make()
    x = images(16, model, 48)
    early = forced(model, way, x)
    if policy != 'patience':
        return check(early, x, (7, 16), policy=policy, ensemble=ensemble)
    with torch.no_grad():
        logits = model.forward_exits(x).logits
    for thresholds in ([2, 2, 2], [1, 1, 1], [None, 1, 2], [2, None, 2]):
        early.rule = ExitRule(4, thresholds, 'patience', ensemble=ensemble)
        assert_same(early(x), choose_exits(early.rule, logits), logits)


def scores_by_hand(policy, z):
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    if policy == 'confidence':
        return p.max()
    if policy == 'margin':
        return np.sort(p)[-1] - np.sort(p)[-2]
    return 1 + (p * np.log(p)).sum() / np.log(len(p))


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('ensemble', [False, True])
def test_offline_rule_is_a_loop_over_samples(policy, ensemble):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(50, 6, generator=generator, dtype=torch.float64) * 2 for _ in range(4)]
    thresholds = [2, 2, None] if policy == 'patience' else [.55, None, .45]
    temperatures = [2., 1., .5, 1.5]
    out = choose_exits(ExitRule(4, thresholds, policy, temperatures, ensemble), logits)
    for n in range(50):
        passed, classes = [], []
        for i in range(4):
            if i < 3 and thresholds[i] is None:
                continue
            passed.append(logits[i][n].numpy())
            answer = np.mean(passed, 0) if ensemble else passed[-1]
            classes.append(answer.argmax())
            if policy == 'patience':
                score = 1
                while score < len(classes) and classes[-1 - score] == classes[-1]:
                    score += 1
            else:
                score = scores_by_hand(policy, answer / temperatures[i])
            if i == 3 or score >= thresholds[i]:
                break
        assert out.exit_index[n] == i
        assert np.allclose(out.logits[n], answer)
        assert np.allclose(out.confidence[n], score, atol=1e-6)
    assert len(out.exit_index.unique()) > 1


@pytest.fixture(scope='module')
def pool():
    model = make()
    x = images(16, model, 48)
    with torch.no_grad():
        return EarlyExit(model), x, model.forward_exits(x).logits


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_thresholds_any_samples(pool, data):
    """Whatever is asked for, each sample leaves where the rule says it does on finished logits."""
    early, x, logits = pool
    policy = data.draw(st.sampled_from(['confidence', 'entropy', 'margin']))
    ensemble = data.draw(st.booleans())
    threshold = st.one_of(st.none(), st.floats(0, 1, allow_subnormal=False))
    thresholds = data.draw(st.lists(threshold, min_size=3, max_size=3))
    early.rule = ExitRule(4, thresholds, policy, [.2] * 4, ensemble)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 15), min_size=1, max_size=16)))
    expected = choose_exits(early.rule, [z[rows] for z in logits])
    out = early(x[rows])
    progress = Progress()
    near = torch.zeros(len(rows), dtype=torch.bool)  # a score on its threshold may fall either way
    for i in early.rule.enabled:
        score = early.rule.answer(i, logits[i][rows], progress)[1]
        near |= (score - thresholds[i]).abs() < 1e-5
    assert torch.equal(out.exit_index[~near], expected.exit_index[~near])
    assert torch.allclose(out.logits[~near], expected.logits[~near], atol=1e-5)


def test_extremes():
    model = make()
    x = images(6, model, 64)
    with torch.no_grad():
        logits = model.forward_exits(x).logits
        plain = model.backbone(x)
    out = EarlyExit(model, 0.)(x)
    assert out.exit_index.tolist() == [0] * 6 and torch.equal(out.logits, logits[0])
    for thresholds in (1.1, [None] * 3, float('inf')):
        out = EarlyExit(model, thresholds)(x)
        assert out.exit_index.tolist() == [3] * 6 and torch.equal(out.logits, plain)
    assert EarlyExit(model)(x[:0]).logits.shape == (0, 5)


@pytest.mark.parametrize('way', ['cut', 'replay'])
def test_what_left_is_not_computed(way):
    """Rows seen by every stage and exit: each row once, and only as far as it goes."""
    model = make()
    x = images(16, model, 64)
    early = forced(model, way, x)
    with torch.no_grad():
        logits = model.forward_exits(x).logits
    early.rule = rule_between(logits)
    went = choose_exits(early.rule, logits).exit_index
    stages = [getattr(model.backbone, f'layer{i}')[-1] for i in range(1, 5)]
    seen = {}
    for number, module in [*enumerate(stages), *((f'exit{i}', e) for i, e in enumerate(model.exits))]:
        module.register_forward_pre_hook(lambda _, inputs, n=number: seen.setdefault(n, []).append(len(inputs[0])))
    early(x)
    left = [int((went >= i).sum()) for i in range(4)]
    assert 0 < left[3] < left[2] < 16
    assert [seen[i] for i in range(4)] == [[rows] for rows in left]
    assert [seen[f'exit{i}'] for i in range(3)] == [[rows] for rows in left[:3]]
    seen.clear()
    early.rule = ExitRule(4, [None, 0., .5])
    early(x)
    assert seen == {0: [16], 1: [16], 'exit1': [16]}


def test_one_row_that_stays_is_not_spread_over_the_batch():
    """A network that keeps the whole batch beside the stage must not be cut: a single row would broadcast silently."""
    model = timm_eed.wrap(KeepsTheBatch())
    x = torch.randn(4, 3, 16, 16)
    early = EarlyExit(model)
    assert early.prepare(x).name == 'replay'
    check(early, x, (1, 2, 4, 4, 4))


class KeepsTheBatch(ThirdPartyNet):
    """The mean of the image, taken before the first stage, is added behind the second."""

    def forward_intermediates(self, x, indices=None, output_fmt='NCHW', intermediates_only=False, stop_early=False):
        shortcut, x, maps = x.mean((1, 2, 3))[:, None, None, None], x.permute(0, 2, 3, 1), []
        for i, stage in enumerate(self.stages[:max(indices) + 1] if stop_early else self.stages):
            x = self._stage(stage, x)
            if i in indices:
                maps.append(x.permute(0, 3, 1, 2))
            x = x + shortcut
        return maps if intermediates_only else (x, maps)

    def _stage(self, stage, x):
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)
        return stage(x)

    def forward_features(self, x):
        return self.forward_intermediates(x, indices=[2])[0]


class MapsPassThroughOneModule(ThirdPartyNet):
    """A module that the forward pass does not know, and that each stage map is the first of its pass to enter."""

    def __init__(self):
        super().__init__()
        self.reorder = nn.Hardtanh(-.5, .5)

    def forward_intermediates(self, x, indices=None, output_fmt='NCHW', intermediates_only=False, stop_early=False):
        x, maps = x.permute(0, 2, 3, 1), []
        for i, stage in enumerate(self.stages[:max(indices) + 1] if stop_early else self.stages):
            x = self._stage(stage, x)
            if i in indices:
                maps.append(self.reorder(x).permute(0, 3, 1, 2))
        return maps if intermediates_only else (x, maps)

    def forward_features(self, x):
        x = x.permute(0, 2, 3, 1)
        for stage in self.stages:
            x = self._stage(stage, x)
        return x


def test_a_module_with_other_inputs_is_not_replayed():
    model = timm_eed.wrap(MapsPassThroughOneModule())
    x = torch.randn(7, 3, 16, 16)
    early = EarlyExit(model)
    assert early.prepare(x).name == 'replay'
    check(early, x, (1, 2, 7))


class NumbersItsRows(KeepsTheBatch):
    """Neither cut nor replay gives what the full batch gives: rows are numbered through the batch."""

    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x, pre_logits) + torch.linspace(0, 1, len(x))[:, None]


def test_what_cannot_be_cut_falls_back_and_says_so():
    model = timm_eed.wrap(NumbersItsRows())
    x = torch.randn(4, 3, 16, 16)
    early = EarlyExit(model)
    with pytest.warns(UserWarning, match='NumbersItsRows cannot go on with a part of a batch: answers are right'):
        assert early.prepare(x).name == 'whole'
    with torch.no_grad():
        logits = model.forward_exits(x).logits
    early.rule = rule_between(logits)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert_same(early(x), choose_exits(early.rule, logits), logits)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('ensemble', [False, True])
def test_fixed_exit_and_anytime(name, ensemble):
    model = make(name)
    x = images(3, model)
    early = EarlyExit(model, [.9, None, .9], ensemble=ensemble)
    with torch.no_grad():
        logits = model.forward_exits(x).logits
    expected = {0: logits[0], 2: (logits[0] + logits[2]) / 2, 3: (logits[0] + logits[2] + logits[3]) / 3}
    if not ensemble:
        expected = dict(enumerate(logits))
        assert torch.equal(early(x, exit=1).logits, logits[1])
    for exit_index in (0, 2, 3):
        out = early(x, exit=exit_index)
        assert torch.equal(out.logits, expected[exit_index])
        assert out.exit_index.tolist() == [exit_index] * 3
    assert torch.equal(early(x, exit=-1).logits, expected[3])
    outputs = list(early.anytime(x))
    assert [int(out.exit_index[0]) for out in outputs] == [0, 2, 3]
    for out in outputs:
        assert torch.equal(out.logits, expected[int(out.exit_index[0])])


def test_anytime_computes_when_asked():
    model = make()
    seen = []
    for i in range(1, 5):
        getattr(model.backbone, f'layer{i}').register_forward_pre_hook(lambda *_, i=i: seen.append(i))
    stream = EarlyExit(model).anytime(images(2, model, 64))
    assert seen == []
    next(stream)
    assert seen == [1]
    assert torch.equal(model(images(2, model, 64)), model.backbone(images(2, model, 64)))  # others may run meanwhile
    seen.clear()
    next(stream)
    assert seen == [1, 2] or seen == [2]
    stream.close()


def test_refusals_name_the_fix():
    model = make()
    x = images(2, model, 64)
    with pytest.raises(ValueError, match='has no exits; make them with'):
        EarlyExit(model.backbone)
    with pytest.raises(ValueError, match="Unknown policy 'sure', choose one of confidence"):
        EarlyExit(model, policy='sure')
    with pytest.raises(ValueError, match='2 thresholds for 3 exits; give one per exit'):
        EarlyExit(model, [.5, .5])
    with pytest.raises(ValueError, match='give whole numbers such as thresholds=2'):
        EarlyExit(model, policy='patience')
    with pytest.raises(ValueError, match='must be finite numbers, or None'):
        EarlyExit(model, float('nan'))
    with pytest.raises(ValueError, match='must be 4 positive numbers'):
        EarlyExit(model, temperatures=[1., 1., 0., 1.])
    with pytest.raises(ValueError, match=r'exit=4 is out of range, choose 0 \(exit1\) to 3'):
        EarlyExit(model)(x, exit=4)
    with pytest.raises(ValueError, match='takes images as a tensor'):
        EarlyExit(model)({'patches': x})
    early = EarlyExit(model)
    model.train()
    with pytest.raises(ValueError, match=r'call model.eval\(\) first'):
        early(x)
    for part in (model.exits, model.backbone.layer1):  # norms would learn from the images that the way is tried with
        model.eval()
        part.train()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r'call model.eval\(\) first'):
            early(x)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize('number', [np.float32(.5), torch.tensor(.5), np.array(.5), [np.float64(.5)] * 3])
def test_thresholds_of_any_number_type(number):
    assert EarlyExit(make(), number).rule.thresholds == [.5] * 3
    for wrong in ('0.5', object()):
        with pytest.raises(ValueError, match='must be a number, or one per exit'):
            EarlyExit(make(), wrong)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize('way', WAYS)
def test_nothing_is_left_behind_by_an_exception(way):
    model = make()
    x = images(4, model, 64)
    early = forced(model, way, x)
    call = nn.Module._call_impl
    exit_forward = model.exits[1].forward
    model.exits[1].forward = lambda x: 1 / 0
    early.rule = ExitRule(4, 1.1)
    with pytest.raises(ZeroDivisionError):
        early(x)
    assert hooks_of(model) == 0 and nn.Module._call_impl is call
    with pytest.raises(RuntimeError):
        early(torch.randn(4, 5, 64, 64))  # wrong channels
    assert hooks_of(model) == 0 and nn.Module._call_impl is call
    model.exits[1].forward = exit_forward
    check(early, x, (4, 2))


@pytest.mark.parametrize('way', WAYS)
def test_threads_share_one_early_exit(way):
    model = make()
    x = images(24, model, 48)
    early = forced(model, way, x)
    with torch.no_grad():
        logits = model.forward_exits(x).logits
    early.rule = rule_between(logits)
    expected = choose_exits(early.rule, logits)
    failures = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(12):
                order = torch.randperm(24, generator=generator)[:1 + seed * 5]
                assert_same(early(x[order]), some_of(expected, order), logits)
                with torch.no_grad():  # the plain network of somebody else
                    assert torch.allclose(model(x[order]), logits[-1][order], atol=1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert hooks_of(model) == 0


@pytest.mark.parametrize('way', ['cut', 'replay'])
def test_a_thousand_calls_leave_nothing(way):
    model = make()
    x = images(4, model, 32)
    early = forced(model, way, x)
    with torch.no_grad():
        early.rule = rule_between(model.forward_exits(x).logits)

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    early(x)
    before, out = tensors(), None
    for _ in range(1000):
        out = early(x)
    reference = weakref.ref(out.logits)
    del out
    assert reference() is None  # no cycle holds the activations
    assert tensors() == before and hooks_of(model) == 0 and len(early._ways) == 1


def test_copies_and_pickles():
    model = make()
    x = images(4, model, 64)
    early = EarlyExit(model, .3)
    expected = early(x)
    for twin in (copy.deepcopy(early), pickle.loads(pickle.dumps(early))):
        assert torch.equal(twin(x).logits, expected.logits)
        for p in twin.parameters():
            p.data.zero_()
        assert torch.equal(early(x).logits, expected.logits)
        assert not torch.equal(twin(x).logits, expected.logits)
    copy.deepcopy(model), pickle.dumps(model)
    rule = ExitRule(4, [.9, None, float('inf')], 'margin', [1., 2., 3., 4.], True)
    assert EarlyExit(model, **rule.settings()).rule.settings() == rule.settings()
    assert rule.settings()['thresholds'] == [.9, None, None]


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('mode', ['autocast', 'bfloat16', 'channels_last', 'checkpointing', 'inference_mode'])
def test_modes(name, mode):
    model = make(name)
    x = images(8, model, None if name == 'test_vit' else 64)
    early = EarlyExit(model)
    if mode == 'autocast':
        with torch.autocast('cpu', dtype=torch.bfloat16):
            check_loosely(early, x)
    elif mode == 'bfloat16':
        model.bfloat16()
        check_loosely(early, x.bfloat16())
    elif mode == 'channels_last':
        model.to(memory_format=torch.channels_last)
        check(early, x.contiguous(memory_format=torch.channels_last), (8, 3))
    elif mode == 'checkpointing':
        early.prepare(x)
        model.set_grad_checkpointing()
        check(early, x, (8, 3))
    else:
        with torch.inference_mode():
            check(early, x, (8, 3))
    assert early.prepare(x).name == 'cut'


def check_loosely(early, x):
    """Half precision: kernels of other batch sizes round otherwise."""
    with torch.no_grad():
        logits = early.model.forward_exits(x).logits
    early.rule = rule_between(logits)
    expected = choose_exits(early.rule, logits)
    out = early(x)
    assert (out.exit_index == expected.exit_index).sum() >= len(x) - 2
    same = out.exit_index == expected.exit_index
    assert torch.allclose(out.logits[same].float(), expected.logits[same].float(),
                          atol=.03 * float(expected.logits.abs().max()))


def test_rows_keep_their_memory_format():
    x = torch.randn(6, 4, 5, 5)
    rows = torch.tensor([0, 3, 5])
    for tensor in (x, x.contiguous(memory_format=torch.channels_last), x.flatten(2).transpose(1, 2)):
        taken = take_rows(tensor, 6, rows)
        assert torch.equal(taken, tensor[rows])
        assert taken.stride()[1:] == tensor.stride()[1:]
    folded = x.repeat_interleave(3, 0)
    assert torch.equal(take_rows(folded, 6, rows), x[rows].repeat_interleave(3, 0))


def test_a_change_of_the_network_is_noticed():
    """Taps that fall silent are looked for anew."""
    model = make()
    x = images(6, model, 64)
    early = EarlyExit(model)
    early.prepare(x)
    model.backbone.layer2 = nn.Sequential(copy.deepcopy(model.backbone.layer2))
    check(early, x, (6, 2))


def test_image_sizes_have_ways_of_their_own():
    for model in (make('test_convnext'), make('test_vit', dynamic_img_size=True)):
        early = EarlyExit(model)
        for height, width in ((64, 64), (96, 64), (64, 96)):
            generator = torch.Generator().manual_seed(3)
            check(early, torch.randn(5, 3, height, width, generator=generator), (5, 2))
        assert len(early._ways) == 3


@pytest.mark.parametrize('part', ['stages', 'blocks', pytest.param('backbone', marks=pytest.mark.slow)])
def test_compiled_backbones(part):
    """Right with any of them; stages or blocks that are compiled one by one stay single graphs."""
    torch._dynamo.reset()
    model = make()
    x = images(8, model, 32)
    with torch.no_grad():
        logits = model.forward_exits(x).logits
    if part == 'backbone':
        model.backbone.compile(backend='aot_eager')
    for name in ('layer1', 'layer2', 'layer3', 'layer4'):
        stage = getattr(model.backbone, name)
        if part == 'stages':
            setattr(model.backbone, name, torch.compile(stage, backend='aot_eager', dynamic=True))
        elif part == 'blocks':
            for block in stage:
                block.compile(backend='aot_eager', dynamic=True)
    early = EarlyExit(model)
    early.rule = rule_between(logits)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert_same(early(x), choose_exits(early.rule, logits), logits)


def test_exits_in_training_mode_are_refused():
    model = timm_eed.create_model('cifar_resnet20')
    model.freeze_backbone()  # stays in evaluation mode when the exits train
    early = EarlyExit(model, .5)
    model.train()
    with pytest.raises(ValueError, match=r'call model.eval\(\) first'):
        early(torch.randn(2, 3, 32, 32))
