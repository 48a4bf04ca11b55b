package lab

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// helperVar selects an action of helper, for a test binary inside a lab.
const helperVar = "MASQUE_LAB_TEST_HELPER"

// helper is the program that tests run in a lab of its own.
func helper() {
	switch os.Getenv(helperVar) {
	case "exit":
		os.Exit(42)
	case "die":
		unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	case "pids":
		fmt.Println(os.Getpid(), os.Getppid(), os.Getuid())
	case "signal":
		c := make(chan os.Signal, 1)
		signal.Notify(c, unix.SIGTERM)
		fmt.Println("ready")
		<-c
		fmt.Println("terminated")
	case "sleep":
		// setsid -f makes a daemon in a session of its own, without a parent.
		if err := exec.Command("setsid", "-f", "sleep", os.Getenv("SLEEP")).Run(); err != nil {
			fmt.Println(err)
		}
		fmt.Println("ready")
		select {}
	case "orphans":
		orphans()
	}
}

// orphans leaves dead children to pid 1 while it waits for children of its own.
func orphans() {
	for i := range 20 {
		err := exec.Command("sh", "-c", "(exit 9) & (exit 8) & exit "+strconv.Itoa(i)).Run()
		if exit, ok := err.(*exec.ExitError); i > 0 && (!ok || exit.ExitCode() != i) {
			fmt.Println("child", i, "ended with", err)
			os.Exit(1)
		}
	}
	deadline := time.Now().Add(patience)
	for {
		stats, err := os.ReadDir("/proc")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		n := 0
		for _, e := range stats {
			if _, err := strconv.Atoi(e.Name()); err == nil {
				n++
			}
		}
		if n == 2 { // pid 1 and this process
			return
		}
		if time.Now().After(deadline) {
			fmt.Println(n, "processes are left")
			os.Exit(1)
		}
		time.Sleep(time.Millisecond)
	}
}

// enter prepares another run of this binary, which has to enter a lab.
func enter(t *testing.T, action string, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(append(os.Environ(), helperVar+"="+action), env...)
	cmd.Stderr = t.Output()
	return cmd
}

func startHelper(t *testing.T, action string, env ...string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := enter(t, action, env...)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	r := bufio.NewReader(out)
	if line, err := r.ReadString('\n'); line != "ready\n" {
		t.Fatalf("the helper printed %q, %v", line, err)
	}
	return cmd, r
}

func TestEnterPassesExitCode(t *testing.T) {
	for action, want := range map[string]int{"exit": 42, "die": 128 + 9, "orphans": 0} {
		t.Run(action, func(t *testing.T) {
			cmd := enter(t, action)
			cmd.Stdout = t.Output()
			cmd.Run()
			if got := cmd.ProcessState.ExitCode(); got != want {
				t.Errorf("exit code %d, want %d", got, want)
			}
		})
	}
}

func TestEnterNamespaces(t *testing.T) {
	out, err := enter(t, "pids").Output()
	must(t, err)
	var pid, parent, uid int
	if _, err := fmt.Sscan(string(out), &pid, &parent, &uid); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	if pid == 1 || parent != 1 || uid != 0 {
		t.Errorf("pid %d, parent %d, uid %d: want root and a child of pid 1", pid, parent, uid)
	}
}

func TestEnterPassesSignals(t *testing.T) {
	cmd, r := startHelper(t, "signal")
	must(t, cmd.Process.Signal(unix.SIGTERM))
	if rest, err := io.ReadAll(r); string(rest) != "terminated\n" {
		t.Errorf("the helper printed %q, %v", rest, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestKillEndsEverything(t *testing.T) {
	// The duration marks the process.
	mark := "1000000." + strconv.Itoa(os.Getpid())
	cmd, _ := startHelper(t, "sleep", "SLEEP="+mark)
	waitForSleepers(t, mark, 1)
	must(t, cmd.Process.Kill())
	cmd.Wait()
	waitForSleepers(t, mark, 0)
}

func TestEnterRefusesForgedStage(t *testing.T) {
	for _, stage := range []string{"program:" + readlink(t, "/proc/self/ns/net"), "init:x"} {
		cmd := enter(t, "exit", stageVar+"="+stage)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		cmd.Run()
		if cmd.ProcessState.ExitCode() != ExitPrivileges ||
			!strings.Contains(stderr.String(), "unset it") {
			t.Errorf("%s: exit code %d, %q", stage, cmd.ProcessState.ExitCode(), &stderr)
		}
	}
}

// TestEnterExplains forbids user namespaces.
func TestEnterExplains(t *testing.T) {
	script := `echo 0 >/proc/sys/user/max_net_namespaces && exec "$0"`
	cmd := exec.Command("unshare", "-Ur", "sh", "-c", script, "/proc/self/exe")
	exe, err := os.Executable()
	must(t, err)
	cmd.Args[len(cmd.Args)-1] = exe
	cmd.Env = append(os.Environ(), helperVar+"=exit")
	out, _ := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != ExitPrivileges ||
		!strings.Contains(string(out), "sysctl -w user.max_net_namespaces=1") ||
		strings.Count(string(out), "\n") != 1 {
		t.Errorf("exit code %d, %q", cmd.ProcessState.ExitCode(), out)
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	l := newLab(t)
	h := newHost(t, l, "a")
	mark := "2000000." + strconv.Itoa(os.Getpid())
	must(t, h.Command(t.Context(), "sleep", mark).Start())
	must(t, h.Command(t.Context(), "setsid", "-f", "sleep", mark).Run())
	waitForSleepers(t, mark, 2)
	ns := h.netName
	must(t, l.Close())
	if n := countSleepers(t, mark); n != 0 {
		t.Errorf("%d sleepers are left", n)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, fd := range fds {
		if link, _ := os.Readlink("/proc/self/fd/" + fd.Name()); link == ns {
			t.Error("the network namespace is still open")
		}
	}
	if err := h.Command(t.Context(), "true").Run(); err == nil {
		t.Error("a program was started in a closed lab")
	}
}

// waitForSleepers waits until n processes sleep for the time mark.
func waitForSleepers(t *testing.T, mark string, n int) {
	t.Helper()
	for deadline := time.Now().Add(patience); countSleepers(t,
		mark) != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d sleepers, want %d", countSleepers(t, mark), n)
		}
	}
}

// countSleepers counts the living processes that sleep for the time mark.
func countSleepers(t *testing.T, mark string) int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	must(t, err)
	n := 0
	for _, e := range entries {
		b, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err == nil && string(b) == "sleep\x00"+mark+"\x00" {
			n++
		}
	}
	return n
}

func readlink(t *testing.T, name string) string {
	t.Helper()
	s, err := os.Readlink(name)
	must(t, err)
	return s
}
