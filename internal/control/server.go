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

// maxSocketPath is the maximum length of a unix socket address in bytes
// (unix(7)).
const maxSocketPath = 107

// Server is the control socket of one instance.
type Server struct {
	path string
	http *http.Server
	done chan struct{}
}

// Serve answers requests on the instance's socket until Close. The caller must
// hold the lock of the name: an existing socket belongs to a dead process and
// is replaced. Clients other than root and the user of this process get status
// 403.
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
	l.(*net.UnixListener).SetUnlinkOnClose(false) // Close removes the file
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

// listenConfig makes sockets that only their owner can connect to. It sets the
// mode before the socket has a name: later, in another user's directory, the
// name could belong to another file.
var listenConfig = net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
		return e
	}
	return err
}}

// Close removes the socket and waits a moment for active requests.
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

// withPeer adds the user ID of the connected process to the context.
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

// onlyOwner admits root and the user of this process.
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

// Reply writes v as JSON on one line.
func Reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client may have disconnected
}

// failure is the body of an error response.
type failure struct {
	Error string `json:"error"`
}

// Fail writes an error response.
func Fail(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(failure{Error: err.Error()})
}

// Stream writes one JSON value per line until next returns false or the client
// disconnects. It sends each value at once.
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
