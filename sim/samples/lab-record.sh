#!/bin/sh
# Records lab.csv: four guests whose demands rise and fall share 1 GiB under the balancer.
#
#   cargo run -p tests --bin lab -- run --memory 4G --bring /out --out out \
#       --file sim/samples/lab-record.sh -- sh /lab/lab-record.sh
set -e
mkdir -p /out

guest() { # NAME LIMITS LOAD
    ballast run --name "$1" --memory "$2" --kernel /guest/6.1/bzImage --initrd /guest/6.1/initrd-agent \
        --cmdline "console=ttyS0 panic=-1 quiet ballast.agent ballast.repeat=20 ballast.load=$3" \
        </dev/null >/dev/null 2>&1 &
}

ballast balancer --budget 1G 2>/out/balancer.log &
guest web 208M,min=128M,max=512M grow:60M:4s,rest:9s,grow:150M:2s,hold:12s,release:3s,rest:6s
guest db 256M,min=160M,max=512M grow:140M:10s,hold:40s,release:1s
guest build 160M,min=128M,max=640M rest:22s,grow:300M:9s,hold:8s,release:1s
guest leak 160M,min=128M,max=448M grow:220M:70s,release,rest:5s
# They boot; whoever takes longer joins the recording later.
sleep 120
ballast record -o /out/lab.csv --for 180s
grep -c OVER /out/balancer.log || true
