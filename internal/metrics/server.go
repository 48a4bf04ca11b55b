package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// What those who ask may cost.
const (
	maxConnections = 32
	maxScrapes     = 4 // at once; others get 503
	maxHeader      = 8 << 10
	readTimeout    = 5 * time.Second
	writeTimeout   = 10 * time.Second
	idleTimeout    = 2 * time.Minute // a scrape a minute keeps its connection
	closeTimeout   = time.Second
	// valuesTimeout is how long the values may take, which is microseconds:
	// when they take longer, something hangs.
	valuesTimeout = 2 * time.Second
)

// Config is what is served.
type Config struct {
	Program Program
	// Values may be called at any time, from several goroutines. While it does
	// not return, the program counts as hanging.
	Values func() Values
	// Well, which may be nil, returns nil when the program is well, and
	// otherwise what is wrong with it.
	Well func() error
	// Ready returns nil when the program does what it is for, and otherwise why
	// not.
	Ready  func() error
	Logger *slog.Logger
}

// Server answers GET /metrics, /healthz and /readyz.
type Server struct {
	http *http.Server
	done chan struct{}
}

// Serve answers on ln, which it closes in the end, until Close.
func Serve(ln net.Listener, c Config) *Server {
	errorLog := slog.NewLogLogger(c.Logger.Handler(), slog.LevelDebug)
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{c.Program, c.Values}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	look := &look{values: c.Values}

	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog: errorLog, MaxRequestsInFlight: maxScrapes, Timeout: writeTimeout / 2,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		say(w, c.illness(r.Context(), look))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		err := c.illness(r.Context(), look)
		if err == nil {
			err = c.Ready()
		}
		say(w, err)
	})
	s := &Server{done: make(chan struct{}), http: &http.Server{
		Handler:     mux,
		ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       errorLog,
	}}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(netutil.LimitListener(ln, maxConnections)); !errors.Is(err,
			http.ErrServerClosed) {
			c.Logger.Error("metrics are not served any more", "address", ln.Addr().String(),
				"error", err)
		}
	}()
	return s
}

// Close stops at once, but for answers under way, which get a moment.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	<-s.done
	return err
}

// illness returns what is wrong with the program, nil when it is well.
func (c Config) illness(ctx context.Context, look *look) error {
	if err := look.hangs(ctx); err != nil || c.Well == nil {
		return err
	}
	return c.Well()
}

// say answers with "ok", or with 503 and what is wrong.
func say(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	text := "ok"
	if err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		text = err.Error()
	}
	fmt.Fprintln(w, text)
}

// look finds out whether the program hangs. However often it is asked, one
// goroutine at most waits for the values.
type look struct {
	values func() Values

	mu      sync.Mutex
	running chan struct{} // closed when the last look has ended; nil before the first
}

var errHangs = errors.New("the program hangs: what it counts cannot be read")

func (l *look) hangs(ctx context.Context) error {
	timeout := time.NewTimer(valuesTimeout)
	defer timeout.Stop()
	select {
	case <-l.begin():
		return nil
	case <-timeout.C:
		return errHangs
	case <-ctx.Done():
		return ctx.Err()
	}
}

// begin begins a look, unless one is going on.
func (l *look) begin() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.running != nil {
		select {
		case <-l.running:
		default:
			return l.running
		}
	}
	done := make(chan struct{})
	l.running = done
	go func() {
		defer close(done)
		l.values()
	}()
	return done
}
