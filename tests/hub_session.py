"""A loopback hub for the whole test session; imported before huggingface_hub, which reads its settings once."""
import os
import tempfile

from loopback_hub import LoopbackHub

HUB = LoopbackHub()
_home = tempfile.TemporaryDirectory(prefix='hf-home-')
for _name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_OFFLINE', 'HF_HUB_CACHE', 'HF_TOKEN_PATH'):
    os.environ.pop(_name, None)
SETTINGS = dict(
    HF_ENDPOINT=HUB.url, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1', HF_HUB_DISABLE_TELEMETRY='1')
os.environ.update(SETTINGS, HF_HOME=_home.name)
