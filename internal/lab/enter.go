package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// stageVar tells a process which of three stages it is. Its value is the stage
// and the original network namespace:
//
//	(unset)  the outer process, which makes the namespaces
//	init     pid 1 inside; it mounts, starts the program and reaps orphans
//	program  the program itself
const stageVar = "MASQUE_LAB_STAGE"

// ExitPrivileges is the exit code of [Enter] when the namespaces cannot be
// made.
const ExitPrivileges = 7

// entered is set in the process that runs inside the namespaces.
var entered atomic.Bool

// Enter moves the program into new mount, network, UTS and process namespaces,
// and into a user namespace when it does not run as root. It must be called
// before the program does anything else: the program is started again from
// its beginning, with the same arguments, environment and standard files, and
// Enter returns only in that second run. The first process forwards signals and
// exits with the exit code of the second.
//
// When the first process dies, also by SIGKILL, the kernel kills all processes
// inside, which removes every namespace, device and mount.
//
// Inside, /proc shows only the lab's processes, /run is empty, and mounts are
// private. When the namespaces cannot be made, Enter prints one line with the
// cause and the remedy, and exits with [ExitPrivileges].
func Enter() {
	if entered.Load() {
		return
	}
	stage, home, _ := strings.Cut(os.Getenv(stageVar), ":")
	switch stage {
	case "init":
		os.Exit(runInit(home))
	case "program":
		// Verify the stage: the variable may have been set by hand.
		if ns, err := os.Readlink("/proc/self/ns/net"); err != nil || ns == home {
			fmt.Fprintf(os.Stderr, "%s: %s is set outside of a lab: unset it\n", progname(),
				stageVar)
			os.Exit(ExitPrivileges)
		}
		os.Unsetenv(stageVar)
		entered.Store(true)
	default:
		code, err := runOutside()
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", progname(), err)
			code = ExitPrivileges
		}
		os.Exit(code)
	}
}

func progname() string { return filepath.Base(os.Args[0]) }

// runOutside starts pid 1 of the lab and waits for it.
func runOutside() (int, error) {
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return 0, fmt.Errorf("cannot read the network namespace: %w: mount /proc", err)
	}
	// The kernel sends Pdeathsig when the thread that started the child ends.
	runtime.LockOSThread()

	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1,
		unix.SIGUSR2)

	// Bytes written here are signals for the program. Init ends when the pipe
	// is closed, which means that this process has ended.
	r, w, err := os.Pipe()
	if err != nil {
		return 0, fmt.Errorf("cannot make a pipe: %w", err)
	}
	cmd, err := startInit(home, r)
	if err != nil {
		return 0, err
	}
	r.Close()
	go func() {
		for s := range signals {
			if n, ok := s.(syscall.Signal); ok && !fromTerminal(n) {
				w.Write([]byte{byte(n)})
			}
		}
	}()
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	return exitCode(cmd.ProcessState.Sys().(syscall.WaitStatus)), nil
}

// startInit starts the program again as pid 1 of new namespaces, with control
// as its file descriptor 3.
func startInit(home string, control *os.File) (*exec.Cmd, error) {
	start := func(user bool) (*exec.Cmd, error) {
		cmd := &exec.Cmd{
			Path: "/proc/self/exe", Args: os.Args,
			Env:   append(os.Environ(), stageVar+"=init:"+home),
			Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
			ExtraFiles: []*os.File{control},
			SysProcAttr: &syscall.SysProcAttr{
				Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS,
				Pdeathsig:  unix.SIGKILL,
			},
		}
		if user {
			cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
			cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
		}
		return cmd, cmd.Start()
	}
	if os.Geteuid() == 0 {
		cmd, err := start(false)
		if !errors.Is(err, fs.ErrPermission) { // containers run root without capabilities
			return cmd, explain(err)
		}
	}
	cmd, err := start(true)
	return cmd, explain(err)
}

// fromTerminal reports whether s came from a key press. The kernel sends those
// signals to every process of the terminal's foreground group, so that the
// program must not receive them a second time.
func fromTerminal(s syscall.Signal) bool {
	if s != unix.SIGINT && s != unix.SIGQUIT {
		return false
	}
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// exitCode returns the code that a shell would report.
func exitCode(s syscall.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}

// explain adds the responsible kernel setting to a failure to make namespaces.
func explain(err error) error {
	if err == nil {
		return nil
	}
	for _, s := range []struct{ key, bad, set string }{
		{"kernel/unprivileged_userns_clone", "0", "1"},
		{"user/max_user_namespaces", "0", "10000"},
		{"user/max_net_namespaces", "0", "10000"},
		{"kernel/apparmor_restrict_unprivileged_userns", "1", "0"},
	} {
		b, rerr := os.ReadFile("/proc/sys/" + s.key)
		if rerr != nil || strings.TrimSpace(string(b)) != s.bad {
			continue
		}
		key := strings.ReplaceAll(s.key, "/", ".")
		return fmt.Errorf("cannot make namespaces: %w (%s is %s): run as root, or `sysctl -w %s=%s`", err, key, s.bad, key, s.set)
	}
	return fmt.Errorf("cannot make namespaces: %w: run as root; in a container, start it with --privileged", err)
}

// CheckTUN returns nil when this process can make TUN devices, and otherwise an
// error with the cause and the remedy.
func CheckTUN() error {
	const dev = "/dev/net/tun"
	fd, err := unix.Open(dev, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		return unix.Close(fd)
	}
	err = fmt.Errorf("cannot make a TUN device: %s: %w", dev, err)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: run as root, or `chmod 0666 %s` as most distributions do", err, dev)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: `modprobe tun`; in a container, start it with --device %s", err, dev)
	}
	return err
}
