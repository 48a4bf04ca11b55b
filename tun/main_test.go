package tun

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const inNamespace = "TUN_TEST_IN_NAMESPACE"

// TestMain runs the tests in a new network namespace. It starts the test binary
// again in the namespace, which ordinary users can do in a user namespace.
func TestMain(m *testing.M) {
	if os.Getenv(inNamespace) != "" {
		os.Exit(m.Run())
	}
	os.Exit(runInNamespace())
}

func runInNamespace() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET,
		Pdeathsig:  unix.SIGKILL,
	}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	// Pdeathsig kills the child when the thread that started it ends.
	runtime.LockOSThread()
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		return max(1, cmd.ProcessState.ExitCode())
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "cannot create a network namespace: %v; "+
			"run as root or allow user namespaces\n", err)
		return 1
	}
	return 0
}
