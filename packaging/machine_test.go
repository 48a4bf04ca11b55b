// Package packaging tests the packages that `make packages` leaves in dist/.
// Each test boots a machine: namespaces with systemd, on which it installs,
// runs, upgrades, removes and purges the packages. The tests need root.
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

// patience is the longest wait for events that take a second or two.
const patience = 60 * time.Second

// keeper runs a machine while its standard input is open, and removes
// everything that the machine leaves behind. The machine has its own control
// group, because systemd would otherwise use the groups of another machine.
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

// boot makes the machine: namespaces, an overlay of the files of this host with
// changes in memory, devices without access to hardware, and systemd as the
// first process. Units that would change the kernel for all namespaces are
// masked.
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

// machine is a running machine. Its /opt/packages holds the packages of dist/
// and a later version of them. Its files disappear with it.
type machine struct {
	*testing.T
	pid string // systemd's process ID
}

// later makes a later version of the packages from the files of dist/ and
// returns its folder.
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

// scratch is a temporary folder for all tests.
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

// newMachine boots a machine that runs until the test ends.
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
	// Ctrl-C must not reach the keeper. It ends after this process, however
	// this process ends.
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
			t.Errorf("the machine ended with %v", err)
		}
		if t.Failed() {
			t.Logf("output of the machine\n%s", log)
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

// children returns the process IDs of the child processes of a process.
func children(pid string) []string {
	// A process that has ended has none.
	list, _ := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
	return strings.Fields(string(list))
}

// command returns a command that runs a shell line on the machine.
func (m *machine) command(line string) *exec.Cmd {
	c := exec.Command("nsenter", "--target", m.pid, "--mount", "--pid", "--net", "--uts", "--ipc",
		"--cgroup", "--root", "--wdns=/", "sh", "-c", line)
	c.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive",
		"LC_ALL=C.UTF-8"}
	return c
}

// do runs a shell line, which must succeed, and returns its output.
func (m *machine) do(line string) string {
	m.Helper()
	out, err := m.command(line).CombinedOutput()
	if err != nil {
		m.Fatalf("%s: %v\n%s\n%s", line, err, out, m.journal())
	}
	return strings.TrimSpace(string(out))
}

// fails runs a shell line, which must end with the given exit code, and returns
// its output.
func (m *machine) fails(code int, line string) string {
	m.Helper()
	c := m.command(line)
	out, _ := c.CombinedOutput() // the exit code is checked below
	if c.ProcessState.ExitCode() != code {
		m.Fatalf("%s: exit code %d, want %d\n%s", line, c.ProcessState.ExitCode(), code, out)
	}
	return strings.TrimSpace(string(out))
}

// is checks the output of a shell line.
func (m *machine) is(line, want string) {
	m.Helper()
	if got := m.do(line); got != want {
		m.Errorf("%s: got %q, want %q", line, got, want)
	}
}

// until waits until ok returns true. condition describes that in messages.
func (m *machine) until(condition string, ok func() bool) {
	m.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			m.Fatalf("not within %v: %s\n%s", patience, condition, m.journal())
		}
	}
}

// journal returns the last lines of the journal.
func (m *machine) journal() []byte {
	out, _ := m.command("journalctl --sync; journalctl --no-pager -o cat -n 100").CombinedOutput()
	return out
}
