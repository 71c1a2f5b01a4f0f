"""git, tar, rsync, a C compiler: what people do to trees of files."""

from tests.programs.conftest import Desk

_GIT = """
export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@example.org GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@example.org
git init -q -b main project && cd project
for d in $(seq 40); do mkdir -p src/$d; for f in $(seq 50); do echo "$d $f" >src/$d/$f.c; done; done
git add . && git commit -qm one
for d in $(seq 1 2 40); do for f in $(seq 50); do echo changed >>src/$d/$f.c; done; done
git mv src/2 moved && git add . && git commit -qm two
git checkout -q -b old HEAD~1 && git checkout -q main
test -z "$(git status --porcelain)"
cd .. && git clone -q project copy && git -C copy gc -q && git -C copy fsck --strict --full
git -C copy status --porcelain
diff -r --exclude=.git project copy
git -C project repack -qad && git -C project fsck --full
"""

_TREE = """
mkdir -p tree/deep/er
head -c 300000 /dev/urandom >tree/random
printf x >tree/small; : >tree/empty
truncate -s 5M tree/sparse; printf end | dd of=tree/sparse bs=1 seek=3M conv=notrunc status=none
ln tree/random tree/deep/hard; ln -s ../random tree/deep/soft; ln -s nowhere tree/dangling
mkfifo tree/fifo
touch -d '2001-02-03 04:05:06.789' tree/small; chmod 4711 tree/small; chmod 2775 tree/deep
setfattr -n user.colour -v blue tree/random
setfacl -m u:4321:rw tree/random; setfacl -d -m g:4321:rx tree/deep
n="tree/$(printf 'odd\\377\\nname')"; echo odd >"$n"
"""


def test_git_works_and_its_repositories_are_whole(desk: Desk) -> None:
    desk.sh(_GIT)


def test_tar_brings_a_tree_back_as_it_was(other_desk: Desk) -> None:
    other_desk.sh(_TREE)
    other_desk.sh(
        """
        flags="--xattrs --xattrs-include=* --acls --sparse"
        tar $flags -cf tree.tar tree && mkdir back && tar $flags -xpf tree.tar -C back
        rsync -aHAXn --checksum --delete --itemize-changes tree/ back/tree/ >difference
        test ! -s difference || { cat difference; exit 1; }
        test "$(stat -c %h back/tree/random)" = 2
        test "$(stat -c %b back/tree/sparse)" -lt 2000
        """
    )


def test_rsync_brings_a_tree_from_the_host_and_back(desk: Desk) -> None:
    away = desk.place.directory / "away"
    away.mkdir()
    away.chmod(0o777)
    desk.run("bash", "-euc", f"cd {away}\n{_TREE}")
    out = desk.sh(
        f"""
        rsync -aHAX --sparse {away}/tree/ here/
        rsync -aHAX --sparse here/ {away}/again/
        rsync -aHAXn --checksum --delete --itemize-changes {away}/tree/ {away}/again/
        rsync -aHAXn --checksum --delete --itemize-changes {away}/tree/ here/
        """
    )
    assert out == ""


def test_a_c_project_is_built_and_runs(other_desk: Desk) -> None:
    out = other_desk.sh(
        """
        mkdir project && cd project
        for i in $(seq 20); do echo "int part$i(void) { return $i; }" >part$i.c; done
        { for i in $(seq 20); do echo "int part$i(void);"; done
          echo '#include <stdio.h>'
          echo 'int main(void) { int sum = 0;'
          for i in $(seq 20); do echo "sum += part$i();"; done
          echo 'printf("%d\\n", sum); return 0; }'; } >main.c
        echo 'OBJECTS := $(patsubst %.c,%.o,$(wildcard *.c))' >Makefile
        printf 'sum: $(OBJECTS)\\n\\t$(CC) -o $@ $^\\n' >>Makefile
        make -s -j2 && ./sum
        touch part3.c && make -s -j2 && ./sum
        ar rcs libparts.a part*.o && strip sum && ./sum
        """
    )
    assert out.split() == ["210", "210", "210"]
