"""int8 by torchao: tests/peers/torchao_tests.py, in a separate environment, because torchao prints at every import."""

import subprocess
from pathlib import Path


def test_int8_by_torchao(peer_python):
    tests = Path(__file__).parent / "peers" / "torchao_tests.py"
    command = [peer_python("torchao"), "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout
