# finish.sh ROOT IMAGE OFFSET KIB UUID PARTUUID SPREAD RULE TEXT: makes a file system of the files in ROOT, at OFFSET
# bytes of IMAGE, KIB large, with a rule of udev's.
set -eu
umask 022
export LC_ALL=C
root=$1 image=$2 offset=$3 kib=$4 uuid=$5 partuuid=$6 spread=$7 rule=$8 text=$9
cd "$root"

# Each guest makes its own.
rm -f etc/ssh/ssh_host_* var/lib/dbus/machine-id var/lib/systemd/random-seed var/lib/systemd/credential.secret
: > etc/machine-id
chmod 444 etc/machine-id

# What the installation leaves behind.
find var/log -type f -delete
rm -f etc/.pwd.lock etc/passwd- etc/group- etc/shadow- etc/gshadow- etc/subuid- etc/subgid-
rm -f var/lib/dpkg/*-old var/cache/debconf/*-old var/cache/ldconfig/aux-cache var/lib/apt/extended_states.*
rm -f etc/apt/apt.conf.d/99mmdebstrap etc/apt/apt.conf.d/00mmdebstrap
for directory in dev run tmp var/tmp var/lib/apt/lists var/cache/apt; do
    find "$directory" -mindepth 1 -delete
done
find . -xdev -name __pycache__ -path './tmp/*' -delete

# The root file system; it grows with its partition.
printf '%s\n' "PARTUUID=$partuuid / ext4 rw,discard,errors=remount-ro,x-systemd.growfs 0 1" > etc/fstab

# The network, where no cloud-init says otherwise: DHCP on each Ethernet.
mkdir -p etc/netplan
rm -f etc/netplan/*
cat > etc/netplan/90-default.yaml <<'END'
network:
    version: 2
    ethernets:
        all-en:
            match:
                name: en*
            dhcp4: true
            dhcp4-overrides:
                use-domains: true
            dhcp6: true
            dhcp6-overrides:
                use-domains: true
        all-eth:
            match:
                name: eth*
            dhcp4: true
            dhcp4-overrides:
                use-domains: true
            dhcp6: true
            dhcp6-overrides:
                use-domains: true
END
chmod 600 etc/netplan/90-default.yaml
ln -sfn ../run/systemd/resolve/stub-resolv.conf etc/resolv.conf
printf '%s\n' localhost > etc/hostname
printf '%s\n' '127.0.0.1 localhost' '::1 localhost ip6-localhost ip6-loopback' 'ff02::1 ip6-allnodes' \
    'ff02::2 ip6-allrouters' > etc/hosts

printf '%s' "$text" > "./$rule"

# The newest file of a package is the newest of all: what came later was made here.
newest=$(find usr/share/doc -name 'changelog*' -type f -printf '%T@\n' | cut -d. -f1 | sort -n | tail -n 1)
find . -xdev -newermt "@$newest" -exec touch --no-dereference --date="@$newest" {} +

export E2FSPROGS_FAKE_TIME="$newest"
mke2fs -q -F -t ext4 -d . -U "$uuid" -b 4096 -I 256 -L '' \
    -O none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum \
    -E "offset=$offset,hash_seed=$spread,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0" \
    "$image" "${kib}k"

# Of a file's times the last change can't be set, and the last access comes from being read; in the file system that
# was made both can.
used=$(dumpe2fs -h "$image?offset=$offset" 2> /dev/null |
    awk -F: '/^Inode count/ { all = $2 } /^Free inodes/ { free = $2 } END { print all - free }')
{ echo 2; seq 11 "$used"; } | sed "s/.*/set_inode_field <&> ctime @$newest\nset_inode_field <&> atime @$newest/" |
    debugfs -w -f - "$image?offset=$offset" > /dev/null
