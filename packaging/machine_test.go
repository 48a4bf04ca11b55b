// Package packaging tests the packages in dist/ as `make packages` leaves them there: on a machine of its own, with systemd, on
// which they are installed, run, upgraded, removed and purged.
package packaging

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patience bounds waits for things that take a second or two.
const patience = 60 * time.Second

// boot makes the machine: namespaces of its own, the files of this one as they are, with changes kept in memory, devices that
// do not reach the real ones, and systemd as its first process. What would change the kernel for all namespaces is masked.
const boot = `set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root" "$1/old"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mkdir -p opt/packages
cp "$2"/*.deb "$3"/*.deb opt/packages
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
rm -rf etc/masque var/lib/masque
pivot_root . mnt
umount -l /mnt
export container=test
exec /lib/systemd/systemd --unit=basic.target --log-target=null --show-status=no </dev/null
`

// machine is a running one. In /opt/packages it has the deb of dist/ and one of the same files to upgrade to. Its files are gone with it.
type machine struct {
	*testing.T
	pid string // of systemd
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("systemd and dpkg need root")
	}
	dist, err := filepath.Abs("../dist")
	if err != nil {
		t.Fatal(err)
	}
	next := t.TempDir()
	nfpm := exec.Command("dist/nfpm", "package", "--config", "packaging/nfpm.yaml", "--packager", "deb", "--target", next)
	nfpm.Dir, nfpm.Env = "..", append(os.Environ(), "PKG_VERSION=9999", "ARCH="+runtime.GOARCH)
	if out, err := nfpm.CombinedOutput(); err != nil {
		t.Fatalf("a package to upgrade to: %v\n%s", err, out)
	}
	log := new(bytes.Buffer)
	cmd := exec.Command("unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child", "sh", "-c", boot, "sh", t.TempDir(), dist, next)
	cmd.Stdout, cmd.Stderr = log, log
	// When this test is killed, all that is in there is too. The kernel does so when the thread ends that started it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		started <- cmd.Start()
		_ = cmd.Wait() // killed
		close(ended)
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // and with it, all that is in there
		<-ended
		if t.Failed() {
			t.Logf("the machine said\n%s", log)
		}
	})
	m := &machine{T: t}
	children := fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid)
	m.until("systemd runs", func() bool {
		select {
		case <-ended:
			t.Fatalf("the machine ended:\n%s", log)
		default:
		}
		pid, err := os.ReadFile(children)
		m.pid = strings.TrimSpace(string(pid))
		if err != nil || m.pid == "" {
			return false
		}
		name, _ := os.ReadFile("/proc/" + m.pid + "/comm")
		if string(name) != "systemd\n" {
			return false
		}
		out, _ := m.command("systemctl is-active basic.target").Output()
		return string(out) == "active\n"
	})
	return m
}

// command is a line of shell on the machine.
func (m *machine) command(line string) *exec.Cmd {
	c := exec.Command("nsenter", "--target", m.pid, "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--root", "--wdns=/", "sh", "-c", line)
	c.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8"}
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

// fails runs a line of shell, which has to end with the given exit code, and returns what it says.
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
	out, _ := m.command("journalctl --no-pager -o cat -n 60").CombinedOutput()
	return out
}
