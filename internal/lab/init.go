package lab

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// controlFD is the file descriptor from which init reads signals for the
// program.
const controlFD = 3

// runInit is pid 1 of the lab. It prepares the mounts, starts the program, and
// reaps orphans until the program ends. It returns the exit code. Its exit
// makes the kernel kill all other processes.
func runInit(home string) int {
	if os.Getpid() != 1 {
		fmt.Fprintf(os.Stderr, "%s: %s is set outside of a lab: unset it\n", progname(), stageVar)
		return ExitPrivileges
	}
	// Signals of key presses reach this process too, but are for the program.
	signal.Notify(make(chan os.Signal, 1))

	if err := prepareMounts(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", progname(), explain(err))
		return ExitPrivileges
	}
	if lo, err := netlink.LinkByName("lo"); err == nil {
		// Programs may test themselves over loopback.
		netlink.LinkSetUp(lo)
	}

	unix.CloseOnExec(controlFD)
	os.Setenv(stageVar, "program:"+home)
	program, err := os.StartProcess("/proc/self/exe", os.Args, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: cannot start the program inside the lab: %v\n", progname(), err)
		return ExitPrivileges
	}
	pid := program.Pid
	program.Release()
	go passSignals(pid)

	for {
		var status syscall.WaitStatus
		reaped, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			fmt.Fprintf(os.Stderr, "%s: cannot wait for the program inside the lab: %v\n",
				progname(), err)
			return 1
		case reaped == pid:
			return exitCode(status)
		}
	}
}

// passSignals sends the program each signal that arrives from outside as one
// byte, and ends the lab when the outer process has ended.
func passSignals(pid int) {
	control := os.NewFile(controlFD, "control")
	buf := make([]byte, 1)
	for {
		if _, err := control.Read(buf); err != nil {
			os.Exit(128 + int(unix.SIGKILL))
		}
		unix.Kill(pid, syscall.Signal(buf[0]))
	}
}

// prepareMounts mounts a /proc for the lab's processes, an empty /run and,
// where the kernel allows it, a /sys for the lab's devices.
func prepareMounts() error {
	for _, m := range []struct {
		source, target, fstype string
		flags                  uintptr
		data                   string
		optional               bool
	}{
		{"none", "/", "", unix.MS_REC | unix.MS_PRIVATE, "", false},
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "", false},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755", false},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "", true},
	} {
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil &&
			!m.optional {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}
