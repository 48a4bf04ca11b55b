// Package packaging tests the packages in dist/ as `make packages` leaves them
// there: on a machine of its own, with systemd, on which they are installed,
// run, upgraded, removed and purged.
package packaging

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds waits for things that take a second or two.
const patience = 60 * time.Second

// keeper keeps a machine for as long as its standard input is open, and removes
// what is left of it. The machine has a control group of its own, without which
// systemd would take the groups of another machine for its own.
const keeper = `set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/cgroup"
mount -t cgroup2 cgroup2 "$1/cgroup"
group="$1/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/masquevpn-machine-$$"
mkdir "$group"
(
	echo 0 > "$group/cgroup.procs"
	exec setpriv --pdeathsig KILL unshare --mount --pid --net --uts --ipc --cgroup --fork --kill-child sh -c "$2" sh "$1" "$3" "$4"
) </dev/null &
cat
echo 1 > "$group/cgroup.kill"
wait || true
until find "$group" -depth -type d -exec rmdir {} + 2>/dev/null; do sleep 0.1; done # the kernel takes a moment
`

// boot makes the machine: namespaces of its own, the files of this one as they
// are, with changes kept in memory, devices that do not reach the real ones,
// and systemd as its first process. What would change the kernel for all
// namespaces is masked.
const boot = `set -e
umount "$1/cgroup"
mkdir "$1/upper" "$1/work" "$1/root" "$1/old"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mkdir -p opt/packages
cp "$2"/*.deb "$2"/*.rpm "$3"/*.deb "$3"/*.rpm opt/packages
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for dir in run tmp dev; do mount -t tmpfs tmpfs $dir; done
mkdir dev/net dev/pts dev/shm run/lock
for device in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0" "net/tun 10 200"; do
	set -- $device
	mknod -m 666 dev/$1 c $2 $3
done
for unit in systemd-sysctl systemd-modules-load systemd-binfmt systemd-udevd systemd-udev-trigger systemd-tmpfiles-setup-dev \
	systemd-remount-fs systemd-journal-flush; do
	ln -sf /dev/null etc/systemd/system/$unit.service
done
ln -sf /dev/null etc/systemd/system/proc-sys-fs-binfmt_misc.automount
rm -f etc/systemd/system/*.wants/*
rm -rf etc/masque var/lib/masque etc/systemd/system/masque-*
chroot . dpkg --purge masquevpn 2>/dev/null >&2
pivot_root . mnt
umount -l /mnt
export container=test
exec /lib/systemd/systemd --unit=basic.target --log-target=journal --show-status=no
`

// machine is a running one. In /opt/packages it has the packages of dist/, and
// those of the same files to upgrade to. Its files are gone with it.
type machine struct {
	*testing.T
	pid string // systemd's process ID
}

// later makes packages to upgrade to, once, of the files of dist/.
var later = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp(scratch, "later")
	if err != nil {
		return "", err
	}
	for _, format := range []string{"deb", "rpm"} {
		nfpm := exec.Command("dist/nfpm", "package", "--config", "packaging/nfpm.yaml",
			"--packager", format, "--target", dir)
		nfpm.Dir, nfpm.Env = "..", append(os.Environ(), "PKG_VERSION=9999", "ARCH="+runtime.GOARCH)
		if out, err := nfpm.CombinedOutput(); err != nil {
			return "", fmt.Errorf("packages to upgrade to: %w\n%s", err, out)
		}
	}
	return dir, nil
})

// scratch is a folder for all tests.
var scratch string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if scratch, err = os.MkdirTemp("", "masquevpn-packaging-*"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(scratch)
		return m.Run()
	}())
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("systemd and dpkg need root")
	}
	dist, err := filepath.Abs("../dist")
	if err != nil {
		t.Fatal(err)
	}
	next, err := later()
	if err != nil {
		t.Fatal(err)
	}
	log := new(bytes.Buffer)
	cmd := exec.Command("unshare", "--mount", "sh", "-c", keeper, "sh", t.TempDir(), boot,
		dist, next)
	cmd.Stdout, cmd.Stderr = log, log
	// Ctrl-C is not for it: it ends after this process, however that ends
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	alive, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		alive.Close()
		if err := <-ended; err != nil {
			t.Errorf("the end of the machine: %v", err)
		}
		if t.Failed() {
			t.Logf("the machine said\n%s", log)
		}
	})
	m := &machine{T: t}
	m.until("systemd runs", func() bool {
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("the machine ended: %v\n%s", err, log)
		default:
		}
		for _, p := range children(strconv.Itoa(cmd.Process.Pid)) {
			for _, m.pid = range children(p) {
				if name, _ := os.ReadFile("/proc/" + m.pid + "/comm"); string(name) != "systemd\n" {
					return false
				}
			}
		}
		if m.pid == "" {
			return false
		}
		out, _ := m.command("systemctl is-active basic.target").Output()
		return string(out) == "active\n"
	})
	return m
}

// children lists the processes that a process started.
func children(pid string) []string {
	// none of a process that is gone
	list, _ := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
	return strings.Fields(string(list))
}

// command is a line of shell on the machine.
func (m *machine) command(line string) *exec.Cmd {
	c := exec.Command("nsenter", "--target", m.pid, "--mount", "--pid", "--net", "--uts", "--ipc",
		"--cgroup", "--root", "--wdns=/", "sh", "-c", line)
	c.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive",
		"LC_ALL=C.UTF-8"}
	return c
}

// do runs a line of shell, which has to succeed, and returns what it says.
func (m *machine) do(line string) string {
	m.Helper()
	out, err := m.command(line).CombinedOutput()
	if err != nil {
		m.Fatalf("%s: %v\n%s\n%s", line, err, out, m.journal())
	}
	return strings.TrimSpace(string(out))
}

// fails runs a line of shell, which has to end with the given exit code, and
// returns what it says.
func (m *machine) fails(code int, line string) string {
	m.Helper()
	c := m.command(line)
	out, _ := c.CombinedOutput() // the exit code says it
	if c.ProcessState.ExitCode() != code {
		m.Fatalf("%s: exit code %d, want %d\n%s", line, c.ProcessState.ExitCode(), code, out)
	}
	return strings.TrimSpace(string(out))
}

// is checks what a line of shell says.
func (m *machine) is(line, want string) {
	m.Helper()
	if got := m.do(line); got != want {
		m.Errorf("%s: says %q, want %q", line, got, want)
	}
}

func (m *machine) until(what string, ok func() bool) {
	m.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			m.Fatalf("not in %v: %s\n%s", patience, what, m.journal())
		}
	}
}

func (m *machine) journal() []byte {
	out, _ := m.command("journalctl --sync; journalctl --no-pager -o cat -n 100").CombinedOutput()
	return out
}
