package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is what fits into a unix socket address (unix(7)).
const maxSocketPath = 107

// A Server is the control socket of one instance.
type Server struct {
	path string
	http *http.Server
	done chan struct{}
}

// Serve answers requests on the instance's socket until Close. The caller
// holds the lock of the name, so that a socket that is already there is a dead
// process's and is replaced. Callers that are neither root nor the user of
// this process get 403.
func Serve(dir, name string, h http.Handler, logger *slog.Logger) (*Server, error) {
	path := SocketPath(dir, name)
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("%s: longer than the %d bytes of a socket's name", path,
			maxSocketPath)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := listenConfig.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // Close does
	s := &Server{path: path, done: make(chan struct{})}
	s.http = &http.Server{
		Handler: onlyOwner(h), ConnContext: withPeer,
		ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 8 << 10,
		ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			logger.Error("control socket", "file", path, "error", err)
		}
	}()
	return s, nil
}

// listenConfig makes sockets that nobody else can connect to. Their mode is set
// before they have a name, which in a folder of another user could be that of
// another file by the time it is used.
var listenConfig = net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
		return e
	}
	return err
}}

// Close removes the socket and waits a moment for requests under way.
func (s *Server) Close() error {
	err := os.Remove(s.path)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		err = errors.Join(err, s.http.Close())
	}
	<-s.done
	return err
}

type peerKey struct{}

// withPeer notes the user at the other end of a connection.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	uid := -1
	if u, ok := c.(*net.UnixConn); ok {
		if raw, err := u.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) {
				if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET,
					unix.SO_PEERCRED); err == nil {
					uid = int(cred.Uid)
				}
			})
		}
	}
	return context.WithValue(ctx, peerKey{}, uid)
}

// onlyOwner lets root and the user of this process pass.
func onlyOwner(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid, ok := r.Context().Value(peerKey{}).(int)
		if !ok || uid != 0 && uid != os.Geteuid() {
			Fail(w, http.StatusForbidden,
				fmt.Errorf("user %d is neither root nor the owner of this process", uid))
			return
		}
		h.ServeHTTP(w, r)
	})
}

// Reply answers with v as JSON on one line.
func Reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // a caller that is gone needs no answer
}

// failure is the body of an answer that is not a success.
type failure struct {
	Error string `json:"error"`
}

// Fail answers with an error.
func Fail(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(failure{Error: err.Error()})
}

// Stream answers with one JSON value per line: next is called until it gives
// false or the caller goes. Each value is sent as soon as it is there.
func Stream(w http.ResponseWriter, r *http.Request, next func(ctx context.Context) (any, bool)) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	flush := http.NewResponseController(w)
	encoder := json.NewEncoder(w)
	for {
		v, ok := next(r.Context())
		if !ok || encoder.Encode(v) != nil || flush.Flush() != nil {
			return
		}
	}
}
