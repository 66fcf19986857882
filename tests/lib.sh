# For bash scripts to source: what they share.

# What elfprobe.py needs, as in README.md; what it and the lab need, as tests/demo; what its tests need, but
# for bpftool; what is in the images of virtual machines, besides a kernel. Each begins with all of the one before.
elfprobe_packages=(python3-bpfcc python3-pyroute2 python3-psutil)
lab_packages=("${elfprobe_packages[@]}" iproute2 iperf3 iputils-ping procps)
test_packages=("${lab_packages[@]}" python3-pytest python3-scapy tcpdump nftables ethtool mount traceroute)
host_packages=(python3-jsonschema jq tshark make man-db zsh)  # of tests that do not run in virtual machines
host_packages+=(python3-prometheus-client curl gcc libc6-dev)
vm_packages=("${test_packages[@]}" bpftool ppp)

# asks_for_help ARGUMENT...: whether there is -h or --help among them, before any --.
asks_for_help() {
    local argument
    for argument; do
        case $argument in
            -h | --help) return 0 ;;
            --) return 1 ;;
        esac
    done
    return 1
}

# show_help: the comment at the head of the script that runs.
show_help() {
    sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"
}

# need_packages PACKAGE...: install those that are missing, on Debian and its kin, when root.
# Where that is not possible it says what is missing and fails.
need_packages() {
    local package count bytes missing=()
    for package; do
        [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    if ((EUID != 0)) || [[ ! -x $(command -v apt-get) ]]; then
        echo "missing (only root can install, by apt-get): ${missing[*]}" >&2
        return 1
    fi
    # A machine just started may still be updating itself, hence the patience with the lock.
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
    local install=(install --no-install-recommends "${missing[@]}")
    echo "installing ${missing[*]}" >&2
    if [[ -z ${lists_are_new-} ]]; then
        echo 'fetching the lists of packages' >&2
        "${apt[@]}" update >&2 || return 1
        lists_are_new=1
    fi
    count=$("${apt[@]}" --simulate "${install[@]}" | grep -c ^Inst) || return 1
    bytes=$("${apt[@]}" --print-uris "${install[@]}" | awk '{ sum += $3 } END { print sum + 0 }')
    echo "fetching $(((bytes + 999999) / 1000000)) MB and installing $count packages:" \
        "$((count / 4 + 5)) to $((count + 10)) seconds, as a rule" >&2
    "${apt[@]}" "${install[@]}" >&2
}

# need_unpacked PROGRAM PACKAGE...: put the distribution's program on the PATH. Its packages are unpacked into the cache:
# to install them would start a service, now and whenever the machine starts.
need_unpacked() {
    [[ ! -x $(command -v "$1") ]] || return 0
    local folder=${ELFPROBE_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/elfprobe-vm}/$2 package
    if [[ ! -x $folder/usr/bin/$1 && ! -x $folder/usr/sbin/$1 ]]; then
        echo "fetching ${*:2}" >&2
        rm -rf "$folder" && mkdir -p "$folder" || return 1
        (
            cd "$folder"
            apt-get -qq download "${@:2}" 2>/dev/null || {
                apt-get -qq update
                apt-get -qq download "${@:2}"
            }
            for package in *.deb; do
                dpkg -x "$package" . && rm "$package" || exit
            done
        ) >&2 || return 1
    fi
    PATH=$PATH:$folder/usr/bin:$folder/usr/sbin
}
