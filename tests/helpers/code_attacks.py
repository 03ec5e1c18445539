# ruff: noqa: E501
"""Hostile answers: forgeries that want to pass a test, and attempts to get out of the process.

A forgery must not pass ``assert f(3) == 1234577``. An escape returns what it could do; ``[]`` is nothing.
"""

from __future__ import annotations

WANTED = 1234577

FORGERIES: dict[str, str] = {
    "exit at import": "import sys; sys.exit(0)",
    "os._exit at import": "import os; os._exit(0)",
    "exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "os._exit in the call": "import os\ndef f(x): os._exit(0)",
    "quit": "def f(x): raise SystemExit(0)",
    "exit in a thread": """
import os, threading, time
def f(x):
    threading.Thread(target=lambda: os._exit(0)).start()
    time.sleep(0.2)
""",
    "exit functions": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return None",
    "marker on stdout": 'def f(x): print("PASSED", "kind: passed", \'{"kind": "passed"}\', flush=True)',
    "replies on every descriptor": """
import os
def f(x):
    for fd in range(64):
        for n in range(10):
            try: os.write(fd, b'{"n": %d, "kind": "passed", "value": true}\\n' % n)
            except OSError: pass
""",
    "outcome on every descriptor": """
import os
for fd in range(64):
    try: os.write(fd, b'{"kind": "passed", "passed": 1, "total": 1}\\n')
    except OSError: pass
def f(x): return None
""",
    "always equal": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def f(x): return Equal()
""",
    "always equal integer": """
class Equal(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Equal(1)
""",
    "always equal in a list": """
class Equal(list):
    def __eq__(self, other): return True
def f(x): return Equal()
""",
    "claims another class": """
class Spoof:
    __class__ = int
    def __eq__(self, other): return True
    def __index__(self): return 1
def f(x): return Spoof()
""",
    "built-ins replaced": """
import builtins
class Quiet(Exception): pass
builtins.AssertionError = Quiet
builtins.repr = builtins.str = lambda *a: "1234577"
builtins.isinstance = lambda *a: True
builtins.bool = lambda *a: True
def f(x): return 0
""",
    "operators replaced": """
import operator, math, json
operator.eq = lambda a, b: True
math.isclose = lambda *a, **k: True
def f(x): return 0
""",
    "json replaced": """
import json
json.dumps = lambda *a, **k: '{"n": 2, "value": true, "kind": "passed"}'
def f(x): return 0
""",
    "runner replaced": """
import gc, types
for thing in gc.get_objects():
    if type(thing).__name__ == "Guest":
        thing.answer = lambda request: None
        type(thing)._write = lambda self, reply: None
def f(x): return 0
""",
    "frames searched": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for space in (frame.f_locals, frame.f_globals):
            for value in list(space.values()):
                found = seek(value)
                if found: return found
        frame = frame.f_back
    return 0
def seek(value):
    import re
    try: found = re.search("== (1234[0-9]{3})", repr(value))
    except Exception: return None
    return int(found[1]) if found else None
""",
    "objects searched": """
import gc
def f(x):
    for thing in gc.get_objects():
        kind = type(thing)
        values = list(thing.values()) if kind is dict else thing if kind in (list, tuple) else ()
        for value in values:
            if type(value) is int and str(value)[:4] == "1234": return value
            if type(value) is str and "== 1234" in value: return int(value.split("== ")[1][:7])
    return 0
""",
    "memory searched": """
import re
def f(x):
    try:
        for line in open("/proc/self/maps"):
            a, b = (int(v, 16) for v in line.split()[0].split("-"))
            if " rw" in line:
                with open("/proc/self/mem", "rb") as m:
                    m.seek(a)
                    found = re.search(rb"== (1234[0-9]{3})", m.read(min(b - a, 1 << 26)))
                    if found: return int(found[1])
    except OSError: pass
    return 0
""",
    "memory searched by address": """
import ctypes, re
def f(x):
    base = id(x) & ~0xfffff
    for at in range(base, base + (1 << 20), 4096):
        found = re.search(rb"== (1234[0-9]{3})", ctypes.string_at(at, 4096))
        if found: return int(found[1])
    return 0
""",
    "assertion raised": "def f(x): raise AssertionError",
    "stop raised": "def f(x): raise StopIteration",
    "generator exit raised": "def f(x): raise GeneratorExit",
    "keyboard interrupt raised": "def f(x): raise KeyboardInterrupt",
    "base exception raised": "class E(BaseException): pass\ndef f(x): raise E()",
    "exception that cannot be shown": """
class E(Exception):
    def __str__(self): import os; os._exit(0)
def f(x): raise E()
""",
    "own check": "def check(candidate): pass\ndef f(x): return None\ncandidate = None",
    "test names": "__checks__ = None\n__name__ = 'tests'\ndef f(x): return None",
    "limit handled": """
import signal
signal.signal(signal.SIGXCPU, lambda *a: None)
def f(x):
    while True: pass
""",
    "pickle": """
class P:
    def __reduce__(self): import os; return os._exit, (0,)
def f(x): return P()
""",
    "dictionary that answers all": """
class D(dict):
    def __getitem__(self, k): return 1
    def __eq__(self, o): return True
def f(x): return D()
""",
    "function": "def f(x): return f",
    "nothing defined": "g = 1",
    "no number": "def f(x): return float('nan')",
    "pipe closed": "import os\ndef f(x):\n    for fd in range(64):\n        try: os.close(fd)\n        except OSError: pass",
    "pipe replaced": """
import os
def f(x):
    r, w = os.pipe()
    os.write(w, b'{"n": 3, "value": true}\\n')
    os.dup2(w, 4); os.dup2(r, 3)
""",
    "endless reply": """
import os
def f(x):
    while True: os.write(4, b"x" * 65536)
""",
    "deep reply": "import os\ndef f(x): os.write(4, b'[' * 100000 + b'\\n')",
    "claims that the runner is broken": 'import os\ndef f(x): os.write(4, b\'{"n": -1, "broken": "x"}\\n\')',
    "claims at import that the runner is broken": """
import os
os.write(4, b'{"n": 1, "broken": "x"}\\n')
os._exit(70)
""",
    "claims a line of a thousand digits": """
import os
os.write(4, b'{"n": 1, "value": {"#": "dict", "v": [["f", {"#": "int", "v": "0x1' + b"0" * 5000 + b'"}]]}}\\n')
def f(x): return 0
""",
    "claims a timeout": 'import os\ndef f(x): os.write(4, b\'{"n": 3, "stuck": 1}\\n\')',
    "not a reply": "import os\ndef f(x): os.write(4, b'\\xff\\x00\\n')",
    "bad value": 'import os\ndef f(x): os.write(4, b\'{"n": 3, "value": {"#": "object", "v": []}}\\n\')',
}

TRICKS: dict[str, tuple[str, str]] = {
    "coroutine": ("async def f(x): return 5", "assert f(1) == 5"),
    "asynchronous generator": ("async def f(x): yield 5", "assert list(f(1)) == [5]"),
    "cancelled": (
        "import asyncio\ndef f(x): raise asyncio.CancelledError",
        "assert all(map(f, [1]))",
    ),
    "end as a default": ("def f(x): raise StopIteration", "assert next(map(f, [1]), 5) == 5"),
    "end named as another": (
        "def f(x): raise type('StopIteration', (Exception,), {'__module__': 'builtins'})",
        "assert all(map(f, [1]))",
    ),
    "context that suppresses": (
        "class C:\n    def __enter__(self): return self\n    def __exit__(self, *a): return True\n"
        "def f(x): return C()",
        "with f(1):\n    assert f(1) == 2",
    ),
    "generator that suppresses": (
        "import contextlib\n@contextlib.contextmanager\ndef f(x):\n    try: yield 5\n    except BaseException: pass",
        "with f(1) as v:\n    assert v == 6",
    ),
    "generator that goes on": (
        "def f(x):\n    while True:\n        try: yield 5\n        except BaseException: pass",
        "g = f(1)\nnext(g)\ng.close()\nassert next(g) == 6",
    ),
    "class as a property": (
        "class C:\n    __class__ = property(lambda s: list)\n    __eq__ = lambda s, o: True\ndef f(x): return C()",
        "assert isinstance(f(1), list) and f(1) == [2]",
    ),
    "attributes of all names": (
        "class C:\n    def __getattribute__(self, n): return lambda *a: True\ndef f(x): return C()",
        "assert f(1) == 6",
    ),
    "true": ("class C:\n    def __bool__(self): return True\ndef f(x): return C()", "assert f(1)"),
    "contains all": (
        "class C:\n    def __contains__(s, o): return True\ndef f(x): return C()",
        "assert 5 in f(1)",
    ),
    "operators": (
        "class C:\n    __sub__ = __rsub__ = __abs__ = lambda *a: 0\ndef f(x): return C()",
        "assert abs(f(1) - 5) < 1e-6",
    ),
    "float with operators": (
        "class C(float):\n    __sub__ = __rsub__ = lambda *a: 0\ndef f(x): return C(3)",
        "assert abs(f(1) - 5) < 1e-6",
    ),
    "hash": (
        "class C:\n    __hash__ = lambda s: hash(5)\n    __eq__ = lambda s, o: True\ndef f(x): return C()",
        "assert f(1) in {5}",
    ),
    "right operand": (
        "class C:\n    __radd__ = lambda s, o: 5\ndef f(x): return C()",
        "assert sum([f(1)]) == 5",
    ),
    "order": (
        "class C:\n    __lt__ = lambda s, o: True\ndef f(x): return C()",
        "assert sorted([1, 2], key=f) == [2, 1]",
    ),
    "equal inside": (
        "class D(dict):\n    __eq__ = lambda s, o: True\ndef f(x): return {1: D()}",
        "assert f(1) == {1: {2: 3}}",
    ),
    "text that no test can read": (
        "def f(x): return '(' * 9000",
        "import ast\nassert ast.literal_eval(f(1)) == 5",
    ),
}
"""Code that uses operators and protocols of its own, and a test that it must not pass."""

ESCAPES: dict[str, str] = {
    "fork": "attempt('fork', lambda: os.fork() or os._exit(0))",
    "spawn": "attempt('spawn', lambda: os.posix_spawn('/bin/true', ['true'], {}))",
    "exec": "attempt('exec', lambda: os.execv('/bin/sh', ['sh', '-c', 'exit 0']))",
    "system": "attempt('system', lambda: os.system('true') == 0 or refuse())",
    "subprocess": "import subprocess\nattempt('run', lambda: subprocess.run(['true'], check=True))",
    "multiprocessing": """
import multiprocessing
def start():
    p = multiprocessing.get_context('fork').Process(target=print); p.start()
attempt('process', start)
""",
    "sockets": """
import _socket
for kind in (_socket.AF_INET, _socket.AF_INET6, _socket.AF_UNIX, 16, 17):
    for type in (1, 2, 3):
        attempt(f'socket {kind} {type}', lambda: _socket.socket(kind, type))
attempt('socketpair', lambda: _socket.socketpair())
""",
    "write outside": """
for folder in (outside, '/', '/tmp', '/etc', '/usr/lib', '/var/tmp', '/root', '/home', '/dev', '/dev/shm', '/run'):
    attempt(folder, lambda: os.close(os.open(folder + '/selfteach_attack', os.O_CREAT | os.O_WRONLY)))
""",
    "change outside": """
for path in (secret, outside):
    attempt('chmod', lambda: os.chmod(path, 0o777))
    attempt('chown', lambda: os.chown(path, 1, 1))
    attempt('times', lambda: os.utime(path, (1, 1)))
    attempt('remove', lambda: os.remove(path))
    attempt('rename', lambda: os.rename(path, path + '2'))
    attempt('truncate', lambda: os.truncate(path, 0))
    attempt('open to truncate', lambda: os.close(os.open(path, os.O_RDONLY | os.O_TRUNC)))
    attempt('attribute', lambda: os.setxattr(path, 'user.a', b'b'))
    attempt('folder', lambda: os.mkdir(path + '3'))
""",
    "read secrets": """
for path in (secret, '/etc/passwd', '/etc/shadow', '/etc/hostname', '/root/.bashrc', home + '/.bashrc'):
    attempt(path, lambda: open(path, 'rb').read())
for folder in (outside, home, '/root', '/home', '/etc', '/', '/tmp', '/proc', '/sys', '/dev'):
    attempt(folder, lambda: [n for n in os.listdir(folder) if n not in harmless] or refuse())
""",
    "processes of others": """
for pid in ('self', 1, 2, os.getppid(), os.getpid(), *range(3, 400)):
    for name in ('environ', 'mem', 'cmdline', 'maps', 'root/etc/passwd', 'cwd', 'fd'):
        attempt(f'{pid} {name}', lambda: open(f'/proc/{pid}/{name}', 'rb').read(10))
""",
    "proc writes": """
for path in ('self/oom_score_adj', 'self/mem', 'sys/kernel/core_pattern', 'self/uid_map', 'sysrq-trigger',
             'self/comm', 'sys/vm/drop_caches'):
    attempt(path, lambda: open('/proc/' + path, 'w').write('0'))
""",
    "environment": """
done += [name for name in os.environ if name not in ('PYTHONHASHSEED', 'LC_ALL', 'TMPDIR', 'HOME', 'PWD')]
""",
    "descriptors": """
for fd in range(256):
    attempt(f'descriptor {fd}', lambda: fd > 4 and os.fstat(fd) or refuse())
""",
    "links in the scratch folder": """
attempt('symlink', lambda: os.symlink(secret, 'link'))
attempt('symlink to /', lambda: os.symlink('/', 'root'))
attempt('hard link', lambda: os.link(secret, 'hard'))
attempt('pipe', lambda: os.mkfifo('pipe'))
attempt('device', lambda: os.mknod('device', 0o20666, os.makedev(1, 1)))
attempt('through', lambda: open('link').read())
attempt('upwards', lambda: open('../' * 9 + secret).read())
""",
    "signals": """
import signal
for pid in (-1, 0, 1, 2, os.getppid(), *range(3, 400)):
    if pid != os.getpid():
        attempt(f'kill {pid}', lambda: os.kill(pid, 0))
attempt('group', lambda: os.killpg(0, 0))
attempt('pidfd', lambda: os.pidfd_open(1))
""",
    "limits raised": """
import resource
for name in ('RLIMIT_AS', 'RLIMIT_CPU', 'RLIMIT_FSIZE', 'RLIMIT_NOFILE', 'RLIMIT_NPROC', 'RLIMIT_CORE'):
    hard = resource.getrlimit(getattr(resource, name))[1]
    attempt(name, lambda: resource.setrlimit(getattr(resource, name), (hard + 1, hard + 1)))
attempt('of another', lambda: resource.prlimit(1, resource.RLIMIT_AS) if os.getpid() != 1 else refuse())
""",
    "identity": """
for name in ('setuid', 'setgid', 'seteuid', 'setegid'):
    attempt(name, lambda: getattr(os, name)(0))
attempt('groups', lambda: os.setgroups([0]))
attempt('session', lambda: os.setsid())
attempt('group of processes', lambda: os.setpgid(0, 0))
attempt('root', lambda: os.chroot('.'))
attempt('priority', lambda: os.setpriority(os.PRIO_PROCESS, 0, -5))
attempt('affinity', lambda: os.sched_setaffinity(0, {0}))
""",
    "system calls": """
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
numbers = {'socket': 41, 'connect': 42, 'sendmsg': 46, 'clone': 56, 'fork': 57, 'vfork': 58, 'execve': 59,
    'ptrace': 101, 'prctl': 157, 'mount': 165, 'umount2': 166, 'reboot': 169, 'init_module': 175,
    'keyctl': 250, 'add_key': 248, 'request_key': 249, 'unshare': 272, 'perf_event_open': 298,
    'open_by_handle_at': 304, 'setns': 308, 'process_vm_readv': 310, 'process_vm_writev': 311,
    'finit_module': 313, 'seccomp': 317, 'memfd_create': 319, 'bpf': 321, 'execveat': 322,
    'userfaultfd': 323, 'pidfd_send_signal': 424, 'io_uring_setup': 425, 'open_tree': 428,
    'move_mount': 429, 'fsopen': 430, 'clone3': 435, 'pidfd_getfd': 438, 'process_madvise': 440,
    'mount_setattr': 442, 'memfd_secret': 447, 'shmget': 29, 'msgget': 68, 'semget': 64, 'mq_open': 240,
    'capset': 126, 'setuid': 105, 'chroot': 161, 'kexec_load': 246, 'iopl': 172, 'swapon': 167,
    'fcntl of an owner': 72, 'x32 getpid': 0x40000000 + 39, 'unknown': 999} if platform.machine() == 'x86_64' else {}
for name, number in numbers.items():
    arguments = (0, 8, os.getpid(), 0, 0, 0) if 'owner' in name else (0, 0, 0, 0, 0, 0)
    ctypes.set_errno(0)
    if libc.syscall(number, *arguments) >= 0 or ctypes.get_errno() not in (1, 38):
        done.append(f'{name} {ctypes.get_errno()}')
""",
    "a process by ctypes": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name in ('fork', 'vfork'):
    if getattr(libc, name)() >= 0: done.append(name)
if libc.system(b'true') == 0: done.append('system')
""",
}
"""Bodies of ``attack``: what they manage to do is in ``done``."""

ESCAPE_FRAME = """
import os
HARMLESS = ('scratch', 'usr', 'lib', 'lib64', 'etc', 'dev', 'proc', 'root', 'tmp', 'null', 'zero', 'full', 'random',
            'urandom', 'tty', 'pts', 'ptmx', 'shm', 'core', 'fd', 'stdin', 'stdout', 'stderr', 'localtime',
            'ld.so.cache', '.pyenv', 'bin', 'opt', 'home', 'console')
def refuse():
    raise OSError
def attack(secret, outside, home):
    done, harmless = [], HARMLESS
    def attempt(name, action):
        try: action()
        except (OSError, ImportError, ValueError, AttributeError): return
        done.append(name)
    BODY
    return done
"""

BOMBS: dict[str, tuple[str, set[str]]] = {
    "fork bomb": ("import os\ndef f(x):\n    while True: os.fork()", {"exception"}),
    "thread bomb": (
        "import threading, time\nthreading.stack_size(32768)\ndef f(x):\n"
        "    while True: threading.Thread(target=time.sleep, args=(9,)).start()",
        {"exit", "exception", "memory", "timeout"},
    ),
    "memory": ("def f(x): return [0] * 10**10", {"memory"}),
    "memory step by step": (
        "def f(x):\n    a = []\n    while True: a.append(bytearray(10**6))",
        {"memory", "timeout"},
    ),
    "memory that is caught": (
        "def f(x):\n    a = []\n    while True:\n        try: a.append(bytearray(10**7))\n"
        "        except MemoryError: pass",
        {"timeout", "memory"},
    ),
    "endless loop": ("def f(x):\n    while True: pass", {"timeout"}),
    "endless sleep": ("import time\ndef f(x): time.sleep(1000)", {"timeout"}),
    "endless read": ("import sys, os\ndef f(x): r, w = os.pipe(); os.read(r, 1)", {"timeout"}),
    "endless in C": ("def f(x): return sum(range(10**18))", {"timeout"}),
    "endless regular expression": (
        "import re\ndef f(x): return re.match(r'(a+)+$', 'a' * 60 + 'b')",
        {"timeout"},
    ),
    "huge power": ("def f(x): return 10 ** 10 ** 10", {"timeout", "memory", "exception"}),
    "huge integer": ("def f(x): return 1 << 10**6", {"failed"}),
    "huge integer as text": ("def f(x): return str(10**10000)", {"exception", "failed"}),
    "deep recursion": ("def f(x): return f(x) + 1", {"exception"}),
    "deeper recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1",
        {"exception", "memory", "exit", "timeout"},
    ),
    "deep value": (
        "def f(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
        {"exception"},
    ),
    "value that contains itself": (
        "def f(x):\n    a = []\n    a.append(a)\n    return a",
        {"exception"},
    ),
    "endless value": ("import itertools\ndef f(x): return itertools.count()", {"failed"}),
    "large value": ("def f(x): return 'x' * 10**8", {"output", "memory", "timeout"}),
    "endless output": ("def f(x):\n    while True: print('x' * 1000)", {"timeout"}),
    "large file": (
        "def f(x):\n    with open('a', 'wb') as file:\n        while True: file.write(bytes(10**6))",
        {"exception"},
    ),
    "many files": (
        "def f(x):\n    i = 0\n    while True:\n        open(str(i), 'wb').write(bytes(10**5))\n        i += 1",
        {"exception", "exit"},
    ),
    "segmentation fault": ("import ctypes\ndef f(x): ctypes.string_at(0)", {"exit"}),
    "abort": ("import os\ndef f(x): os.abort()", {"exit"}),
    "kills itself": ("import os\ndef f(x): os.kill(os.getpid(), 9)", {"exit", "memory", "failed"}),
    "source that breaks the parser": ("(" * 10**5, {"syntax", "memory"}),
    "source that is deep": ("x = " + "-" * 10**5 + "1", {"syntax", "memory", "exception", "exit"}),
    "null character": ("def f(x): return 1\0", {"syntax", "exception"}),
}
"""Code, and the kinds of outcome that are right for it."""

REPORT = """import os
print(7, flush=True)
os.write(4, b'{"n": 1, "value": null}\\n')
"""
"""Prints the right output, and reports as `guest` does that the program is over."""
BAD_PROGRAMS: dict[str, str] = {
    "endless output": "while True: print('x' * 1000)",
    "marker": "print('PASSED')",
    "right output, then an exception": "print(7)\nraise ValueError",
    "right output, then a failure": "import os\nprint(7, flush=True)\nos._exit(1)",
    "right output, then no end": "print(7, flush=True)\nwhile True: pass",
    "right output and a report, then no end": REPORT + "while True: pass",
    "right output and a report, then a wait": REPORT + "import time\ntime.sleep(99)",
    "right output and a report, then an exception": REPORT + "raise ValueError",
    "right output and a report, then a failure": REPORT + "os._exit(1)",
    "right output and a report that it is broken": "import os\nprint(7, flush=True)\n"
    'os.write(4, b\'{"n": 1, "broken": "x"}\\n\')',
    "right output and more": "print(7)\nprint(8)",
    "exit status": "import sys\nsys.exit(3)",
    "nothing": "",
    "threads that do not end": "import threading, time\nprint(7)\nthreading.Thread(target=time.sleep, args=(99,)).start()",
    "killed": "import os\nprint(7, flush=True)\nos.abort()",
}
