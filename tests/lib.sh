# For bash scripts to source: what they share.

# What the tests of elfprobe.py need, but for bpftool.
test_packages=(python3-bpfcc python3-pyroute2 python3-psutil python3-pytest python3-scapy iproute2 iperf3
               iputils-ping tcpdump nftables ethtool procps traceroute)
# What is in the images of virtual machines, besides a kernel.
vm_packages=("${test_packages[@]}" bpftool ppp)

# need_packages PACKAGE...: install those that are missing, on Debian and its kin, when root.
# Where that is not possible it says what is missing and fails.
need_packages() {
    local package missing=()
    for package; do
        [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    if ((EUID != 0)) || [[ ! -x $(command -v apt-get) ]]; then
        echo "missing (only root can install, by apt-get): ${missing[*]}" >&2
        return 1
    fi
    echo "installing: ${missing[*]}" >&2
    # A machine just started may still be updating itself, hence the patience with the lock.
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
    "${apt[@]}" update >&2 && "${apt[@]}" install --no-install-recommends "${missing[@]}" >&2
}
