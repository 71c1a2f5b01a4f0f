# Shells share open files with all that they run, by offset.
i=0; while [ $i -lt 90 ]; do : <written 2>/dev/null || :; echo $i >>written; i=$((i + 1)); done
cksum <written
(echo a; /bin/echo b; busybox echo c; env -i /bin/echo d; cat written | tail -n 1) >f; cat f
{ echo 1; (echo 2; echo 3 >&2) 2>&1; sh -c 'echo 4; exec busybox echo 5'; } >f; cat f
exec 3<written; read x <&3; echo $x; head -n 1 <&3 >/dev/null; exec 3<&-
exec 3<written; busybox dd bs=1 count=4 <&3 2>/dev/null; read x <&3; echo "$x"; cat <&3 | cksum
exec 4>f; echo one >&4; /bin/echo two >&4; busybox echo three >&4; echo four >&4; exec 4>&-; cat f
exec 5<>f; read x <&5; printf 'TWO' >&5; cat <&5; exec 5>&-; cat f
while read x; do read y; echo "$x-$y"; done <written | cksum
(while read x; do case $x in 5) break;; esac; done; cat) <written | head -n 2
seq 1 200 | while read n; do echo "line $n"; done >f; wc f
for n in 1 2 3 4 5 6; do (echo "from $n" >>appended; /bin/echo "again $n" >>appended) & done; wait; sort appended
echo kept >f; (echo more; cat f) >>f 2>&1; head -c 30 f
x=$(cat <f; echo done) && echo "$x"
cat <<END >f && sh f
echo here document \$(wc -l <written)
END
trap 'echo left >>f' EXIT; (exit 3) || echo status $?
cat written written >both; cmp written both || wc -c <both
echo "last" >f; exec cat f
