"""Rewards: the answers that each kind accepts, and what a program in its sandbox can't do."""

import os
import subprocess
import sys
import time
import warnings

import pytest

from jaxgpt.errors import RunError, UserError
from jaxgpt.evaluation import programs, rewards
from jaxgpt.evaluation.programs import Limits
from jaxgpt.evaluation.rewards import Answered
from jaxgpt.options.config import Objective

ASKED = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2?"}]

PYTHON = os.path.realpath(sys.executable)  # not the environment's, which may lie in /tmp, where the sandbox has nothing


def of(reward: str, text: str, answer: str = "4") -> float:
    (found,) = rewards.make(Objective(reward=reward))([Answered(ASKED, answer, text)])
    return found


@pytest.mark.parametrize(
    ("reward", "text", "expected"),
    [
        ("exact", "4", 1),
        ("exact", " 4\n", 1),
        ("exact", "44", 0),
        ("exact", "Answer: 4", 0),
        ("exact:Answer:", "2 and 2. Answer: 4", 1),
        ("exact:Answer:", "Answer: 5. No, Answer: 4", 1),
        ("exact:Answer:", "Answer: 4. No, Answer: 5", 0),
        ("exact:Answer:", "4", 0),
        ("exact:####", "#### 4 ", 1),
        ("regex:^Answer: [0-9]+$", "Answer: 12", 1),
        ("regex:^Answer: [0-9]+$", "Answer: twelve", 0),
        ("regex:^Answer: {answer}$", "Answer: 4", 1),
        ("regex:^Answer: {answer}$", "Answer: 5", 0),
    ],
)
def test_what_is_right(reward, text, expected):
    assert of(reward, text) == expected


def test_the_answer_in_a_pattern_is_no_pattern():
    assert of("regex:^{answer}$", "xx", ".*") == 0
    assert of("regex:^{answer}$", ".*", ".*") == 1


def test_a_function_of_the_users(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(text): return len(text)\n"
        "def right(text, answer): return text == answer\n"
        "def all(text, prompt, answer): return prompt == '2 + 2?' and answer == '4'\n"
        "def fails(text):\n    return 1 / 0\n"
        "def nothing(text): pass\n"
        "def infinite(text): return float('inf')\n"
        "def huge(text): return 1e300\n"
        "def whole(text): return 10 ** 400\n"
        "def ends(text): raise SystemExit(3)\n"
        "import os\n"
        "def ends_at_once(text): os._exit(0)\n"
        "def forks(text):\n    child = os.fork()\n    if not child: os._exit(5)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
    )
    assert of(f"{path}:length", "four") == 4
    assert of(f"{path}:right", "4") == 1
    assert of(f"{path}:all", "") == 1
    for name, message in (
        ("fails", "ZeroDivisionError: division by zero (line 5), of the text 'x'"),
        ("nothing", "returned None, and no finite number"),
        ("infinite", "returned inf, and no finite number"),
        ("huge", "returned 1e+300, and no finite number between -1e+15 and 1e+15, of 'x'"),
        ("whole", "returned a number of 1,329 bits, and no finite number between"),
        ("ends", "SystemExit: 3 (line 10), of the text 'x'"),
        ("ends_at_once", "SystemExit: os._exit(0) (line 12), of the text 'x'"),
    ):
        with pytest.raises(RunError, match=r"--objective.reward .*mine.py") as raised:
            of(f"{path}:{name}", "x")
        assert message in str(raised.value)
    with warnings.catch_warnings(action="ignore"):  # JAX and newer Pythons warn of a fork among threads
        assert of(f"{path}:forks", "") == 5
    path.write_text("def f(:")
    with pytest.raises(UserError, match=r"SyntaxError: .*line 1"):
        of(f"{path}:f", "x")


# Programs

sandboxed = pytest.mark.skipif(bool(programs._refusal()), reason="this system allows no namespaces")
LIMITS = Limits(5.0, 1 << 29)


def runs(code: str, limits: Limits = LIMITS, text: str = "4", **variables: str) -> bool:
    """Returns whether Python in the sandbox ends with status 0."""
    return programs.succeeds([PYTHON, "-I", "-c", code], text, limits, variables)


@sandboxed
def test_a_program_has_the_text_and_says_whether_it_is_right():
    program = f"program:{PYTHON} -I -c 'import os, sys; sys.exit(sys.stdin.read() != os.environ[\"ANSWER\"])'"
    assert of(program, "4") == 1
    assert of(program, "5") == 0
    assert of(program, "\udcff'; rm -rf /") == 0
    assert runs("import os; assert os.environ['PROMPT'] == '2 + 2?'", PROMPT="2 + 2?")
    assert runs("import os; assert not {'USER', 'PYTHONPATH', 'PWD'} & set(os.environ)")


@sandboxed
@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('1.1.1.1', 53), 1)",
        "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\n"
        "socket.create_connection(s.getsockname(), 1)",
    ],
)
def test_there_is_no_network(code):
    """Its own addresses can't be reached either: its one network device is down."""
    assert not runs(code)


@sandboxed
def test_nothing_can_be_written_but_to_an_empty_folder(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    for code in ("open({0!r}, 'w')", "import os; os.remove({0!r})", "import os; os.rename({0!r}, {0!r} + '2')"):
        assert not runs(code.format(str(victim)))
    assert victim.read_text() == "kept"
    assert runs("import os; assert os.listdir('/tmp') == []; open('/tmp/x', 'w').write('x')")
    assert not runs("open('/tmp/x', 'wb').write(bytes(100 << 20))")
    assert runs("open('/dev/null', 'w').write('x'); assert len(open('/dev/urandom', 'rb').read(3)) == 3")


@sandboxed
@pytest.mark.parametrize("namespaces", [0, 0x10000000 | 0x20000])
def test_the_file_system_stays_read_only(namespaces):
    """This holds for a program that makes a user and a mount namespace of its own, too."""
    assert not runs(
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        f"assert libc.unshare({namespaces}) == 0\n"
        "assert libc.mount(None, b'/', None, 32 | 4096, None) == 0"
    )


@sandboxed
def test_time_and_memory_are_limited():
    started = time.monotonic()
    brief = Limits(1.0, 1 << 29)
    assert not runs("while True: pass", brief)
    assert not runs("import time; time.sleep(100)", brief)
    assert time.monotonic() - started < 20
    assert runs("x = bytearray(1 << 27)")
    assert not runs("x = bytearray(1 << 30)")


@sandboxed
def test_a_fork_bomb_is_small_and_ends():
    assert runs(
        "import os, time\nn = 0\ntry:\n  while True:\n    if os.fork() == 0: time.sleep(60)\n    n += 1\n"
        "except BlockingIOError:\n  assert n < 100, n"
    )
    started = time.monotonic()
    assert not runs("import os\nwhile True:\n  try: os.fork()\n  except BlockingIOError: pass", Limits(1.0, 1 << 29))
    assert time.monotonic() - started < 30


@sandboxed
def test_nothing_outlives_a_program():
    """Children in sessions of their own end with it, whether it ends or is ended."""
    for last in ("", "\ntime.sleep(100)"):
        runs(
            f"import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(98765)\n"
            f"  os._exit(0)\ntime.sleep(0.2){last}",
            Limits(1.0, 1 << 29),
        )
    time.sleep(0.3)
    assert "98765" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


@sandboxed
def test_it_sees_neither_other_processes_nor_open_files():
    assert runs("import os; assert [name for name in os.listdir('/proc') if name.isdigit()] == ['1']")
    with open("/dev/null") as file:
        assert file.fileno() > 2
        assert runs("import os; assert len(os.listdir('/proc/self/fd')) == 4")  # three, and the folder


@sandboxed
def test_a_program_that_there_is_not():
    with pytest.raises(UserError, match=r"program: it can't be run .*no-such-program: No such file"):
        of("program:no-such-program", "x")


def test_no_program_is_run_where_the_network_can_not_be_shut_off(monkeypatch):
    monkeypatch.setattr(programs, "_refusal", lambda: "unshare: Operation not permitted")
    with pytest.raises(UserError, match=r"the network could not be kept from it \(unshare: Operation not permitted\)"):
        of("program:true", "x")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("", "is missing"),
        ("exactly", "is 'exactly'"),
        ("regex:", "is 'regex:'"),
        ("regex:(", "is no regular expression"),
        ("program:'", "is no command"),
        ("mine.py", "is 'mine.py'"),
        ("no.py:f", "there is no such file"),
    ],
)
def test_what_is_no_reward(reward, message):
    with pytest.raises(UserError, match=r"--objective\.reward") as raised:
        of(reward, "x")
    assert message in str(raised.value)
