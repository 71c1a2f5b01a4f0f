"""The tenant `site`: a web server answering from outside its container, and an interpreter at work."""

import urllib.request

from demo.shell import Shell, step

PORT = "7680"
_COMPILE = (
    "import compileall, pathlib, shutil; shutil.copytree('/usr/lib/python3.11', '/tmp/lib');"
    "compileall.compile_dir('/tmp/lib', quiet=2, force=True);"
    "print(sum(1 for _ in pathlib.Path('/tmp/lib').rglob('*.pyc')), 'modules compiled')"
)


def run_site(shell: Shell, image: str) -> list[str]:
    step("site: a web server answers a request from outside its container")
    page = "echo '<h1>served by the tenant site</h1>' >/srv/index.html"
    server = f"{page} && exec python3 -m http.server --bind 127.0.0.1 --directory /srv {PORT}"
    shell.polytropo("run", "-d", "--tenant", "site", "--name", "web", image, "sh", "-c", server)
    probe = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{PORT}/').status)"
    shell.until("the web server", "exec", "web", "python3", "-c", probe, expected="200")
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=10) as answer:
        body = answer.read().decode().strip()
    print(body, flush=True)
    if "served by the tenant site" not in body:
        raise SystemExit("demo: the web server answered something else")
    shell.polytropo("logs", "web", show=True)

    step("site: Python copies and compiles its own library")
    compiled = shell.polytropo("run", "--tenant", "site", "--rm", image, "python3", "-c", _COMPILE, show=True)
    shell.polytropo("ps", show=True)
    shell.polytropo("stop", "web")
    return [
        "site  web server: a request from outside the container answered",
        f"site  Python: {compiled.strip()} in a container",
    ]
